//! Ranks as threads of one process, on the CPU.

use super::channel::tests::free_port;
use super::*;
use candle_core::{DType, Device};
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

/// What each rank returns.
fn on_ranks<T: Send>(
    size: usize,
    work: impl Fn(Communicator) -> Result<T> + Sync,
) -> Vec<Result<T>> {
    let work = &work;
    thread::scope(|scope| {
        let ranks = worlds(size).into_iter().map(|world| {
            scope.spawn(move || work(Communicator::new(&world, &Device::Cpu, LIMIT)?))
        });
        let ranks: Vec<_> = ranks.collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

/// The error of each rank.
fn errors<T>(results: Vec<Result<T>>) -> Vec<String> {
    let errors = results.into_iter().map(|result| result.err().unwrap());
    // Without the backtrace that candle appends if it is told to.
    let first_line = |error: Error| error.to_string().lines().next().unwrap_or("").to_owned();
    errors.map(first_line).collect()
}

fn var(values: &[f64], dtype: DType) -> Result<Var> {
    Var::from_tensor(&Tensor::new(values, &Device::Cpu)?.to_dtype(dtype)?)
}

fn values(tensor: &Tensor) -> Result<Vec<f64>> {
    tensor.to_dtype(DType::F64)?.flatten_all()?.to_vec1()
}

#[test]
fn gradients_are_averaged_in_every_dtype() -> Result<()> {
    let results = on_ranks(3, |communicator| {
        let rank = communicator.rank() as f64;
        let mut vars = vec![];
        for dtype in [DType::F32, DType::F64, DType::F16, DType::BF16] {
            vars.push((format!("{dtype:?}"), var(&[rank, 1.0, -2.0], dtype)?));
        }
        communicator.ensure_same(&[("examples", "3".to_owned())], &vars)?;
        communicator.broadcast(&vars)?;
        for (_, var) in &vars {
            assert_eq!(values(var)?, [0.0, 1.0, -2.0]);
        }
        // d/dx (rank + 1) x² = 2 (rank + 1) x, on the average 4 x.
        let mut averages = vec![];
        for (name, var) in &vars {
            let loss = (var.sqr()? * (rank + 1.0))?.sum_all()?;
            let mut gradients = loss.backward()?;
            let named = [(name.clone(), var.clone())];
            communicator.average_gradients(&named, &mut gradients)?;
            let gradient = gradients.get(var).unwrap();
            assert_eq!(gradient.dtype(), var.dtype());
            averages.push(values(gradient)?);
        }
        communicator.barrier()?;
        let times = communicator.all_reduce_times();
        assert_eq!((times.calls, times.bytes), (4, 6));
        communicator.leave()?;
        Ok(averages)
    });
    for averages in results {
        assert_eq!(averages?, vec![vec![0.0, 4.0, -8.0]; 4]);
    }
    Ok(())
}

#[test]
fn one_process_needs_no_other() -> Result<()> {
    let communicator = Communicator::new(&World::single(), &Device::Cpu, LIMIT)?;
    let vars = [("x".to_owned(), var(&[1.0, 2.0], DType::F32)?)];
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
            .map(|name| Ok((name.to_string(), var(&[1.0], dtype)?)));
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
        let (x, y) = (var(&[1.0], DType::F32)?, var(&[1.0], DType::F32)?);
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
