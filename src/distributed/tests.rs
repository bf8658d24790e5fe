//! Ranks as threads of one process, on the CPU and, with the feature `nccl`, on as many GPUs.

use super::channel::tests::free_port;
use super::*;
use candle_core::{DType, Device};
use std::sync::{Mutex, PoisonError};
use std::thread;

const LIMIT: Duration = Duration::from_secs(20);

fn worlds(size: usize) -> Vec<World> {
    let port = free_port();
    let ranks = 0..size;
    let world = |rank| World {
        rank,
        size,
        local_rank: rank,
        host: "127.0.0.1".to_owned(),
        port,
    };
    ranks.map(world).collect()
}

/// What each of these devices' ranks returns.
fn on_devices<T: Send>(
    devices: &[Device],
    work: impl Fn(Communicator) -> Result<T> + Sync,
) -> Vec<Result<T>> {
    // Two communicators of NCCL at work on one device may each wait for what the other keeps from starting.
    static GPUS: Mutex<()> = Mutex::new(());
    let is_on_cpu = devices.iter().all(Device::is_cpu);
    let _alone = (!is_on_cpu).then(|| GPUS.lock().unwrap_or_else(PoisonError::into_inner));
    let work = &work;
    thread::scope(|scope| {
        let ranks = worlds(devices.len())
            .into_iter()
            .zip(devices)
            .map(|(world, device)| {
                scope.spawn(move || work(Communicator::new(&world, device, LIMIT)?))
            });
        let ranks: Vec<_> = ranks.collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

fn on_ranks<T: Send>(
    size: usize,
    work: impl Fn(Communicator) -> Result<T> + Sync,
) -> Vec<Result<T>> {
    on_devices(&vec![Device::Cpu; size], work)
}

/// The CPU as several devices and, where there are as many, GPUs.
fn devices(size: usize) -> Result<Vec<Vec<Device>>> {
    #[allow(unused_mut)] // without the feature
    let mut kinds = vec![vec![Device::Cpu; size]];
    #[cfg(feature = "nccl")]
    match cudarc::driver::CudaContext::device_count() {
        Ok(gpus) if gpus as usize >= size => {
            kinds.push((0..size).map(Device::new_cuda).collect::<Result<_>>()?);
        }
        _ => println!("skipped on CUDA: fewer than {size} GPUs"),
    }
    Ok(kinds)
}

/// The error of each rank.
fn errors<T>(results: Vec<Result<T>>) -> Vec<String> {
    let errors = results.into_iter().map(|result| result.err().unwrap());
    // Without the backtrace that candle appends if it is told to.
    let first_line = |error: Error| error.to_string().lines().next().unwrap_or("").to_owned();
    errors.map(first_line).collect()
}

fn var(values: &[f64], dtype: DType, device: &Device) -> Result<Var> {
    Var::from_tensor(&Tensor::new(values, device)?.to_dtype(dtype)?)
}

fn values(tensor: &Tensor) -> Result<Vec<f64>> {
    tensor.to_dtype(DType::F64)?.flatten_all()?.to_vec1()
}

#[test]
fn gradients_are_averaged_in_every_dtype() -> Result<()> {
    for devices in devices(2)? {
        for averages in on_devices(&devices, averages) {
            // d/dx (rank + 1) x² = 2 (rank + 1) x, on the average 3 x.
            assert_eq!(averages?, vec![vec![0.0, 3.0, -6.0]; 4]);
        }
    }
    Ok(())
}

/// The gradients of `(rank + 1) x²` in all dtypes, as they are after averaging.
fn averages(communicator: Communicator) -> Result<Vec<Vec<f64>>> {
    let rank = communicator.rank() as f64;
    let mut vars = vec![];
    for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
        let var = var(&[rank, 1.0, -2.0], dtype, &communicator.device)?;
        vars.push((format!("{dtype:?}"), var));
    }
    communicator.ensure_same(&[("examples", "3".to_owned())], &vars)?;
    communicator.broadcast(&vars)?;
    for (_, var) in &vars {
        assert_eq!(values(var)?, [0.0, 1.0, -2.0]);
    }
    let mut loss = Tensor::zeros((), DType::F64, &communicator.device)?;
    for (_, var) in &vars {
        let squares = (var.sqr()? * (rank + 1.0))?.sum_all()?;
        loss = (loss + squares.to_dtype(DType::F64)?)?;
    }
    let mut gradients = loss.backward()?;
    communicator.average_gradients(&vars, &mut gradients)?;
    let mut averages = vec![];
    for (_, var) in &vars {
        let gradient = gradients.get(var).unwrap();
        assert_eq!(
            (gradient.dtype(), gradient.dims()),
            (var.dtype(), var.dims())
        );
        averages.push(values(gradient)?);
    }
    communicator.barrier()?;
    let times = communicator.all_reduce_times();
    assert_eq!((times.calls, times.bytes), (1, 3 * (4 + 8 + 2 + 2)));
    communicator.leave()?;
    Ok(averages)
}

#[test]
fn replicas_stay_the_same_bits() -> Result<()> {
    use crate::optim::{AdamW, ParamsAdamW};
    use candle_nn::Optimizer;

    for devices in devices(2)? {
        let replicas = on_devices(&devices, |communicator| {
            let mut vars = vec![];
            let large = match communicator.device.is_cpu() {
                true => 50_000,
                false => 20_000_000,
            };
            for (i, len) in [3, large, 1, 1000].into_iter().enumerate() {
                let values = Tensor::rand(-1f32, 1., len, &communicator.device)?;
                vars.push((format!("var{i}"), Var::from_tensor(&values)?));
            }
            communicator.broadcast(&vars)?;
            let mut optimizer = AdamW::with_names(vars.clone(), ParamsAdamW::default())?;
            for _ in 0..2 {
                let mut loss = Tensor::zeros((), DType::F32, &communicator.device)?;
                for (_, var) in &vars {
                    let noise = Tensor::rand(-1f32, 1., var.dims(), &communicator.device)?;
                    loss = (loss + (var.as_tensor() * noise)?.sum_all()?)?;
                }
                let mut gradients = loss.backward()?;
                communicator.average_gradients(&vars, &mut gradients)?;
                optimizer.step(&gradients)?;
            }
            let vars = vars.iter().map(|(_, var)| var.to_vec1::<f32>());
            let vars: Vec<_> = vars.collect::<Result<_>>()?;
            communicator.leave()?;
            Ok(vars)
        });
        let mut replicas = replicas.into_iter();
        let first = replicas.next().unwrap()?;
        for replica in replicas {
            assert!(replica? == first);
        }
    }
    Ok(())
}

/// The other's all-reduce would wait forever, on the device.
#[test]
fn a_rank_that_ends_frees_the_device_of_the_other() -> Result<()> {
    for devices in devices(2)? {
        let results = on_devices(&devices, |communicator| {
            let vars = [(
                "x".to_owned(),
                var(&[1.0], DType::F32, &communicator.device)?,
            )];
            communicator.broadcast(&vars)?;
            communicator.device.synchronize()?;
            communicator.barrier()?;
            if communicator.rank() == 1 {
                return Ok(String::new());
            }
            let mut gradients = vars[0].1.sqr()?.sum_all()?.backward()?;
            let averaged = communicator.average_gradients(&vars, &mut gradients);
            communicator.device.synchronize()?;
            let error = averaged.and(communicator.check()).unwrap_err();
            Ok(error.to_string())
        });
        let said = results.into_iter().next().unwrap()?;
        assert!(said.contains("rank 1 (127.0.0.1) has ended"), "{said}");
    }
    Ok(())
}

#[test]
fn one_process_needs_no_other() -> Result<()> {
    let communicator = Communicator::new(&World::single(), &Device::Cpu, LIMIT)?;
    let vars = [("x".to_owned(), var(&[1.0, 2.0], DType::F32, &Device::Cpu)?)];
    communicator.ensure_same(&[], &vars)?;
    communicator.broadcast(&vars)?;
    let mut gradients = vars[0].1.sqr()?.sum_all()?.backward()?;
    communicator.average_gradients(&vars, &mut gradients)?;
    assert_eq!(values(gradients.get(&vars[0].1).unwrap())?, [2.0, 4.0]);
    assert_eq!(communicator.gather(b"a")?, Some(vec![b"a".to_vec()]));
    assert_eq!(communicator.broadcast_bytes(Some(b"b".to_vec()))?, b"b");
    communicator.barrier()?;
    communicator.leave()
}

#[test]
fn messages_of_any_length_arrive_in_order() {
    let message = |rank: usize| vec![rank as u8; 3_000_000 * rank];
    let results = on_ranks(3, |communicator| {
        let all = communicator.gather(&message(communicator.rank()))?;
        assert_eq!(all.is_some(), communicator.rank() == 0);
        assert!(all.is_none_or(|all| all == [message(0), message(1), message(2)]));
        for _ in 0..50 {
            let bytes = (communicator.rank() == 0).then(|| message(2));
            assert_eq!(communicator.broadcast_bytes(bytes)?, message(2));
        }
        communicator.leave()
    });
    assert!(results.iter().all(Result::is_ok), "{results:?}");
}

#[test]
fn what_differs_between_ranks_is_named_on_all() -> Result<()> {
    type Facts = (Vec<(&'static str, String)>, Vec<(String, Var)>);
    let facts = |examples: usize, names: &[&str], dtype| -> Result<Facts> {
        let vars = names
            .iter()
            .map(|name| Ok((name.to_string(), var(&[1.0], dtype, &Device::Cpu)?)));
        let facts = vec![("examples", examples.to_string())];
        Ok((facts, vars.collect::<Result<_>>()?))
    };
    type Odd = (usize, &'static [&'static str], DType);
    for ((examples, names, dtype), said) in [
        ((9, &["a", "b"], DType::F32), "examples is 9, not 8"),
        (
            (8, &["a", "b"], DType::F64),
            "variable a is F64 of shape [1], not F32 of shape [1]",
        ),
        (
            (8, &["a", "c"], DType::F32),
            "it has variable c, not variable b",
        ),
        ((8, &["a"], DType::F32), "it lacks variable b"),
        (
            (8, &["a", "b", "c"], DType::F32),
            "it has besides variable c",
        ),
    ] as [(Odd, &str); 5]
    {
        let results = on_ranks(3, |communicator| {
            let (facts, vars) = match communicator.rank() {
                2 => facts(examples, names, dtype)?,
                _ => facts(8, &["a", "b"], DType::F32)?,
            };
            communicator.ensure_same(&facts, &vars)
        });
        let expected = format!("hashed-embedding-bag: rank 2 differs from rank 0: {said}");
        assert_eq!(errors(results), vec![expected; 3]);
    }
    Ok(())
}

#[test]
fn gradients_that_cannot_be_averaged_are_refused_by_name() -> Result<()> {
    let sparse = crate::HashedEmbeddingBagConfig {
        sparse: true,
        ..Default::default()
    };
    let results = on_ranks(2, |communicator| {
        let var = || var(&[1.0], DType::F32, &Device::Cpu);
        let (x, y) = (var()?, var()?);
        let mut gradients = x.sqr()?.sum_all()?.backward()?;
        let vars = candle_nn::VarMap::new();
        let vb = candle_nn::VarBuilder::from_varmap(&vars, DType::F32, &Device::Cpu);
        let layer = crate::hashed_embedding_bag(100, 4, 0.5, sparse, vb.pp("items"))?;
        let table = crate::optim::named_variables(&vars)?;
        let mut said = vec![];
        for vars in [
            table,
            vec![("y".to_owned(), y)],
            vec![("z".to_owned(), Var::new(&[1u32], &Device::Cpu)?)],
        ] {
            let error = communicator
                .average_gradients(&vars, &mut gradients)
                .unwrap_err();
            said.push(error.to_string());
        }
        drop(layer);
        communicator.leave()?;
        Ok(said)
    });
    for said in results {
        let said = said?;
        assert!(
            said[0].contains("items.hashed_weight has sparse gradients"),
            "{said:?}"
        );
        assert!(said[1].contains("y has no gradient to average"), "{said:?}");
        assert!(
            said[2].contains("z must have one of the dtypes"),
            "{said:?}"
        );
    }
    Ok(())
}

#[test]
fn a_rank_that_ends_ends_the_others_by_name() {
    for lost in [0, 1, 2] {
        let start = Instant::now();
        let results = on_ranks(3, |communicator| {
            communicator.barrier()?;
            if communicator.rank() == lost {
                return Ok(());
            }
            communicator.barrier()
        });
        let mut results = results;
        results.remove(lost).unwrap();
        let said = errors(results);
        let expected = format!("rank {lost} (127.0.0.1) has ended before the others");
        assert!(said.iter().all(|said| said.contains(&expected)), "{said:?}");
        assert!(start.elapsed() < LIMIT / 2);
    }
}

#[test]
fn bandwidth_is_that_of_nccl_tests() {
    let mut times = AllReduceTimes::default();
    assert_eq!(times.bus_bandwidth(2), 0.0);
    times.add(1000, Duration::from_secs(4));
    times.add(1000, Duration::from_secs(2));
    assert_eq!(times.mean(), Duration::from_secs(3));
    assert_eq!(times.bus_bandwidth(2), 500.0);
    assert_eq!(times.bus_bandwidth(8), 875.0);
}
