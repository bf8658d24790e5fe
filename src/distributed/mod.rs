//! Data-parallel training: several processes, one per GPU, that hold the same model and average their gradients.
//!
//! A hashed table fits every GPU, so nothing is sharded: each process, a rank, computes the gradients of its own examples, one
//! [all-reduce](Communicator::average_gradients) per step averages them, and every rank takes the same optimiser step.
//!
//! ```text
//! rank 0: batch 0 ──> gradients ──┐               ┌──> optimiser step
//!                                 ├── all-reduce ──┤                     the same bits on both
//! rank 1: batch 1 ──> gradients ──┘               └──> optimiser step
//! ```
//!
//! Processes are started by a launcher, such as torchrun, Slurm or mpirun, which tells each who it is through the environment:
//! see [`World::from_env`]. On CUDA devices the engine is NCCL, with the feature `nccl`; it is looked for when a [`Communicator`]
//! is made, as `libnccl.so.2`, and need not be there to build. On a CPU, gradients pass through rank 0 over TCP, which is enough
//! to develop and test, and for models of a few million parameters.
//!
//! ```
//! use candle_core::{DType, Device};
//! use candle_hashed_embedding_bag::distributed::{Communicator, World};
//! use candle_hashed_embedding_bag::hashed_embedding_bag;
//! use candle_hashed_embedding_bag::optim::{named_variables, AdamW, ParamsAdamW};
//! use candle_nn::{Module, Optimizer, VarBuilder, VarMap};
//! use std::time::Duration;
//!
//! # fn main() -> candle_core::Result<()> {
//! let world = World::from_env()?.unwrap_or_else(World::single);
//! let device = Device::Cpu; // or world.cuda_device()?
//! let communicator = Communicator::new(&world, &device, Duration::from_secs(120))?;
//!
//! let vars = VarMap::new();
//! let vb = VarBuilder::from_varmap(&vars, DType::F32, &device);
//! let layer = hashed_embedding_bag(1_000_000, 16, 1.0 / 64.0, Default::default(), vb)?;
//! let mut optimizer = AdamW::from_varmap(&vars, ParamsAdamW::default())?;
//!
//! let parameters = named_variables(&vars)?;
//! communicator.ensure_same(&[("examples", "1000".to_string())], &parameters)?;
//! communicator.broadcast(&parameters)?;
//! # let indices = candle_core::Tensor::new(&[[7u32, 9]], &device)?;
//! // For each batch of this rank's examples, as many on all ranks:
//! let loss = layer.forward(&indices)?.sqr()?.mean_all()?;
//! let mut gradients = loss.backward()?;
//! communicator.average_gradients(&parameters, &mut gradients)?;
//! optimizer.step(&gradients)?;
//!
//! communicator.leave()?;
//! # Ok(())
//! # }
//! ```
//!
//! # When a rank is lost
//!
//! If a process dies, or hangs, or sends nothing any more, the others' calls fail with an error that names its rank, at once if it
//! has died and otherwise after the time limit: the launcher can then restart them all. NCCL's own errors, which it reports
//! asynchronously, have the same effect. Waiting on the device ends too, since the communicator is aborted; what it was to compute is
//! then undefined, so call [`Communicator::check`] before results are saved. A process that has not dropped its communicator ten
//! seconds after a failure, because something else keeps it, prints the error and exits with status 1.

mod buckets;
mod channel;
#[cfg(feature = "nccl")]
mod nccl;
mod world;

use crate::error::{bail, error};
use crate::op::{SparseGradient, WEIGHT_DTYPES};
use candle_core::backprop::GradStore;
use candle_core::{DType, Device, Error, Result, Tensor, Var};
use channel::Channel;
use std::cell::Cell;
use std::time::{Duration, Instant};

pub use world::World;

/// The connection of this process to all others of its [`World`].
///
/// Its methods are collectives unless they say otherwise: all ranks must call them in the same order, and with the same variables.
pub struct Communicator {
    world: World,
    device: Device,
    /// `None` if there is one rank.
    ranks: Option<Ranks>,
    times: Cell<AllReduceTimes>,
}

struct Ranks {
    // Before the channel, whose watch may otherwise outlive what it watches.
    engine: Engine,
    channel: Channel,
}

enum Engine {
    /// Through rank 0.
    Host,
    #[cfg(feature = "nccl")]
    Nccl(nccl::Nccl),
}

/// What [`Communicator::average_gradients`] has taken: on CUDA, as measured on the device.
///
/// A rank that is ahead waits for the others within its all-reduce, so the fastest one says more of the connection than the mean.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub struct AllReduceTimes {
    /// How many calls were measured. On CUDA a call is not if the one before it has not yet been done when it starts.
    pub calls: u64,
    /// The bytes of the gradients in each call.
    pub bytes: usize,
    /// The time of all of these calls together.
    pub total: Duration,
    /// The time of the fastest.
    pub fastest: Duration,
}

impl AllReduceTimes {
    fn add(&mut self, bytes: usize, time: Duration) {
        self.fastest = match self.calls {
            0 => time,
            _ => self.fastest.min(time),
        };
        self.calls += 1;
        self.bytes = bytes;
        self.total += time;
    }

    /// The mean time of a call; zero before the first.
    pub fn mean(&self) -> Duration {
        self.total.div_f64(self.calls.max(1) as f64)
    }

    /// The bandwidth of the fastest call in bytes per second, as nccl-tests define it: `bytes / time * 2 (ranks - 1) / ranks`, what a link
    /// carries whatever the number of ranks.
    pub fn bus_bandwidth(&self, ranks: usize) -> f64 {
        let share = 2.0 * (ranks as f64 - 1.0) / ranks as f64;
        match self.fastest.as_secs_f64() {
            0.0 => 0.0,
            seconds => self.bytes as f64 / seconds * share,
        }
    }
}

/// What becomes of the values that each rank has.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Collective {
    Average,
    /// Those of rank 0 replace the others.
    Broadcast,
}

impl Communicator {
    /// Connects the ranks of `world`, of which all must call it. `device` is the one that this rank's variables are on; on CUDA, its
    /// stream is the one that collectives run on. `limit` is how long ranks may take to find each other, and how long one may be
    /// silent later, or keep the others waiting.
    ///
    /// # Errors
    /// If the port at rank 0 is in use; if not all ranks have come within the limit; if they have different versions of this crate
    /// or another `size`, or two have the same rank; on CUDA, if this crate was built without the feature `nccl`, or libnccl is not
    /// found or too old, or what it says. On Metal.
    pub fn new(world: &World, device: &Device, limit: Duration) -> Result<Self> {
        if device.is_metal() {
            bail!("ranks train on CPU or CUDA, got Metal");
        }
        if limit.is_zero() {
            bail!("the time limit of ranks must be above 0");
        }
        let ranks = match world.size {
            0 | 1 => None,
            _ => Some(Ranks::new(world, device, limit)?),
        };
        Ok(Self {
            world: world.clone(),
            device: device.clone(),
            ranks,
            times: Cell::default(),
        })
    }

    /// The number of this process, below [`size`](Self::size). Not a collective.
    pub fn rank(&self) -> usize {
        self.world.rank
    }

    /// The number of processes. Not a collective.
    pub fn size(&self) -> usize {
        self.world.size
    }

    /// Whether no rank has been lost so far. Not a collective.
    ///
    /// # Errors
    /// Which rank was lost, and how.
    pub fn check(&self) -> Result<()> {
        self.ranks.as_ref().map_or(Ok(()), |r| r.channel.check())
    }

    /// Refuses ranks that were started with something else than rank 0: these facts, such as the number of examples or a setting,
    /// and the names, shapes and dtypes of the variables.
    ///
    /// # Errors
    /// The first difference, by rank and name, on all ranks.
    pub fn ensure_same(&self, facts: &[(&str, String)], vars: &[(String, Var)]) -> Result<()> {
        let facts = facts
            .iter()
            .map(|(name, value)| (name.to_string(), value.clone()));
        let vars = vars.iter().map(|(name, var)| {
            let value = format!("{:?} of shape {:?}", var.dtype(), var.dims());
            (format!("variable {name}"), value)
        });
        let mine: Vec<(String, String)> = facts.chain(vars).collect();
        let Some(all) = self.gather(&serde_json::to_vec(&mine).map_err(Error::wrap)?)? else {
            return self.agree(None);
        };
        let mut difference = String::new();
        for (rank, theirs) in all.iter().enumerate().skip(1) {
            let theirs: Vec<(String, String)> =
                serde_json::from_slice(theirs).map_err(Error::wrap)?;
            if let Some(found) = differs(&mine, &theirs) {
                difference = format!("rank {rank} differs from rank 0: {found}");
                break;
            }
        }
        self.agree(Some(difference))
    }

    /// Fails on all ranks if rank 0 says why.
    fn agree(&self, why_not: Option<String>) -> Result<()> {
        match String::from_utf8(self.broadcast_bytes(why_not.map(String::into_bytes))?) {
            Ok(why_not) if why_not.is_empty() => Ok(()),
            Ok(why_not) => Err(error(why_not)),
            Err(e) => Err(Error::wrap(e)),
        }
    }

    /// Sets the variables to the values they have at rank 0.
    ///
    /// # Errors
    /// If a variable has a dtype other than f32, f64, f16 or bf16, or is on another device, or has sparse gradients, which could not be
    /// averaged later; a rank that was lost; what the device says.
    pub fn broadcast(&self, vars: &[(String, Var)]) -> Result<()> {
        if self.ranks.is_none() {
            return Ok(());
        }
        self.check_variables(vars)?;
        let values: Vec<_> = vars
            .iter()
            .map(|(_, var)| var.as_tensor().clone())
            .collect();
        for ((_, var), value) in vars
            .iter()
            .zip(self.exchange(&values, Collective::Broadcast)?)
        {
            var.set(&value)?;
        }
        Ok(())
    }

    /// Replaces the gradients of these variables by their averages over all ranks, which are the same bits on all.
    ///
    /// They are copied one after the other into a few large buffers, of which one all-reduce each is put on the stream of the
    /// device; the call does not wait for it. If every rank takes the mean over as many examples, the average is the gradient of the
    /// mean over the examples of all.
    ///
    /// # Errors
    /// A variable without a gradient, or with a sparse one, which has no tensor to average; a gradient that does not fit its variable;
    /// a dtype other than f32, f64, f16 or bf16; a rank that was lost; what the device says. If one rank has an error, the others
    /// lose it.
    pub fn average_gradients(&self, vars: &[(String, Var)], grads: &mut GradStore) -> Result<()> {
        if self.world.size <= 1 {
            return Ok(());
        }
        self.check_variables(vars)?;
        let mut values = vec![];
        for (name, var) in vars {
            let Some(gradient) = grads.get(var) else {
                bail!("{name} has no gradient to average");
            };
            if (gradient.dtype(), gradient.dims()) != (var.dtype(), var.dims()) {
                bail!(
                    "the gradient of {name} must be {:?} of shape {:?}, got {:?} of {:?}",
                    var.dtype(),
                    var.dims(),
                    gradient.dtype(),
                    gradient.dims()
                );
            }
            values.push(gradient.clone());
        }
        let averages = self.exchange(&values, Collective::Average)?;
        for ((_, var), average) in vars.iter().zip(averages) {
            grads.insert(var, average);
        }
        Ok(())
    }

    /// Waits until all ranks have called it. It does not wait for the device.
    ///
    /// # Errors
    /// A rank that was lost.
    pub fn barrier(&self) -> Result<()> {
        self.ranks.as_ref().map_or(Ok(()), |r| r.channel.barrier())
    }

    /// At rank 0, the bytes that each rank has given, by rank; elsewhere `None`. For scores and the like; it goes over TCP.
    ///
    /// # Errors
    /// A rank that was lost.
    pub fn gather(&self, bytes: &[u8]) -> Result<Option<Vec<Vec<u8>>>> {
        match &self.ranks {
            Some(ranks) => ranks.channel.gather(bytes),
            None => Ok(Some(vec![bytes.to_vec()])),
        }
    }

    /// On all ranks, the bytes that rank 0 has given; it must give some, what others give is ignored. It goes over TCP.
    ///
    /// # Errors
    /// A rank that was lost; nothing from rank 0.
    pub fn broadcast_bytes(&self, bytes: Option<Vec<u8>>) -> Result<Vec<u8>> {
        match (&self.ranks, bytes) {
            (Some(ranks), bytes) => ranks.channel.broadcast(bytes),
            (None, Some(bytes)) => Ok(bytes),
            (None, None) => bail!("rank 0 has nothing to broadcast"),
        }
    }

    /// What averaging has taken so far. Not a collective.
    pub fn all_reduce_times(&self) -> AllReduceTimes {
        match self.ranks.as_ref().map(|ranks| &ranks.engine) {
            #[cfg(feature = "nccl")]
            Some(Engine::Nccl(nccl)) => nccl.times(),
            _ => self.times.get(),
        }
    }

    /// Ends the connection. Without it, a rank whose communicator is dropped counts as lost to the others.
    ///
    /// # Errors
    /// A rank that was lost; what the device says, for which it waits.
    pub fn leave(self) -> Result<()> {
        self.device.synchronize()?;
        match self.ranks {
            Some(ranks) => ranks.channel.leave(),
            None => Ok(()),
        }
    }

    fn check_variables(&self, vars: &[(String, Var)]) -> Result<()> {
        for (name, var) in vars {
            let dtype = var.dtype();
            if !WEIGHT_DTYPES.contains(&dtype) {
                bail!("{name} must have one of the dtypes {WEIGHT_DTYPES:?}, got {dtype:?}");
            }
            if SparseGradient::find(var).is_some() {
                bail!("{name} has sparse gradients, which ranks cannot average: build its layer without `sparse`");
            }
            if !var.device().same_device(&self.device) {
                bail!(
                    "{name} must be on the device of the communicator, {:?}, got {:?}",
                    self.device.location(),
                    var.device().location()
                );
            }
        }
        Ok(())
    }

    /// The result for each of these tensors, of which all ranks have the same number, with the same shapes and dtypes.
    fn exchange(&self, tensors: &[Tensor], collective: Collective) -> Result<Vec<Tensor>> {
        let Some(ranks) = &self.ranks else {
            return Ok(tensors.to_vec());
        };
        ranks.channel.check()?;
        let sizes: Vec<_> = tensors
            .iter()
            .map(|t| (t.dtype(), t.elem_count()))
            .collect();
        let bytes = sizes
            .iter()
            .map(|(dtype, len)| dtype.size_in_bytes() * len)
            .sum();
        let start = Instant::now();
        let work = || -> Result<Vec<Tensor>> {
            let mut results = tensors.to_vec();
            for bucket in buckets::divide(&sizes) {
                let flat = bucket.join(tensors)?;
                bucket.split(&ranks.run(&flat, collective)?, &mut results)?;
            }
            Ok(results)
        };
        match &ranks.engine {
            Engine::Host => {
                let results = work()?;
                if collective == Collective::Average {
                    let mut times = self.times.get();
                    times.add(bytes, start.elapsed());
                    self.times.set(times);
                }
                Ok(results)
            }
            #[cfg(feature = "nccl")]
            Engine::Nccl(nccl) if collective == Collective::Average => nccl.timed(bytes, work),
            #[cfg(feature = "nccl")]
            Engine::Nccl(_) => work(),
        }
    }
}

impl Ranks {
    fn new(world: &World, device: &Device, limit: Duration) -> Result<Self> {
        match device {
            Device::Cpu => Ok(Self {
                channel: Channel::meet(world, limit)?,
                engine: Engine::Host,
            }),
            #[cfg(feature = "nccl")]
            Device::Cuda(device) => {
                // Before the ranks meet: that it is missing is known at once.
                let library = nccl::Library::load()?;
                let channel = Channel::meet(world, limit)?;
                let engine = Engine::Nccl(nccl::Nccl::new(library, world, device, &channel)?);
                Ok(Self { engine, channel })
            }
            _ => {
                bail!("ranks on CUDA need the feature `nccl`, which this program was built without")
            }
        }
    }

    /// The result for one flat tensor.
    fn run(&self, flat: &Tensor, collective: Collective) -> Result<Tensor> {
        match &self.engine {
            Engine::Host => self.through_rank_0(flat, collective),
            #[cfg(feature = "nccl")]
            Engine::Nccl(nccl) => {
                self.channel.enter()?;
                nccl.run(flat, collective)?;
                Ok(flat.clone())
            }
        }
    }

    /// Sums in f64, in the order of the ranks, which holds values of all dtypes exactly.
    fn through_rank_0(&self, flat: &Tensor, collective: Collective) -> Result<Tensor> {
        let encode = |values: &[f64]| values.iter().flat_map(|v| v.to_le_bytes()).collect();
        let decode = |bytes: &[u8]| -> Vec<f64> {
            let (values, _) = bytes.as_chunks();
            values.iter().map(|v| f64::from_le_bytes(*v)).collect()
        };
        let mut values = flat.to_dtype(DType::F64)?.to_vec1::<f64>()?;
        let mine: Vec<u8> = encode(&values);
        let result = match collective {
            Collective::Broadcast => Some(mine),
            Collective::Average => match self.channel.gather(&mine)? {
                None => None,
                Some(all) => {
                    for (rank, theirs) in all.iter().enumerate().skip(1) {
                        let theirs = decode(theirs);
                        if theirs.len() != values.len() {
                            bail!("rank {rank} averages other variables than rank 0");
                        }
                        values.iter_mut().zip(theirs).for_each(|(sum, v)| *sum += v);
                    }
                    let ranks = all.len() as f64;
                    values.iter_mut().for_each(|sum| *sum /= ranks);
                    Some(encode(&values))
                }
            },
        };
        let result = decode(&self.channel.broadcast(result)?);
        Tensor::from_vec(result, flat.dims(), flat.device())?.to_dtype(flat.dtype())
    }
}

/// The first fact that is not the same, if there is one.
fn differs(ours: &[(String, String)], theirs: &[(String, String)]) -> Option<String> {
    for pair in ours.iter().zip(theirs) {
        match pair {
            (ours, theirs) if ours == theirs => {}
            ((our_name, ours), (name, theirs)) if our_name == name => {
                return Some(format!("{name} is {theirs}, not {ours}"));
            }
            ((name, _), (their_name, _)) => {
                return Some(format!("it has {their_name}, not {name}"))
            }
        }
    }
    let (len, more, has) = match ours.len() > theirs.len() {
        true => (theirs.len(), ours, "lacks"),
        false => (ours.len(), theirs, "has besides"),
    };
    more.get(len).map(|(name, _)| format!("it {has} {name}"))
}

#[cfg(test)]
mod tests;
