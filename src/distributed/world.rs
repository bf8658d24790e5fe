//! Which process this is, of how many, and where they meet: what launchers put into the environment.

use crate::error::bail;
#[cfg(feature = "cuda")]
use crate::error::error;
use candle_core::{Device, Result};

/// The port at which ranks meet, instead of the one that follows from `MASTER_PORT`.
pub(super) const PORT: &str = "HEB_PORT";

/// A process among those that train together.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct World {
    /// The number of this process, below `size`.
    pub rank: usize,
    /// The number of processes.
    pub size: usize,
    /// The number of this process among those of its host: the GPU it is to use.
    pub local_rank: usize,
    /// The name or address of the host of rank 0.
    pub host: String,
    /// The port at which rank 0 waits for the others.
    pub port: u16,
}

impl World {
    /// From `RANK`, `WORLD_SIZE`, `LOCAL_RANK`, `MASTER_ADDR` and `MASTER_PORT`; `None` if neither `RANK` nor `WORLD_SIZE` is set.
    ///
    /// The port is `HEB_PORT` if that is set. Otherwise it is `MASTER_PORT`, or the port after it if torchrun itself listens at
    /// `MASTER_PORT`, which it says by `TORCHELASTIC_USE_AGENT_STORE=True`.
    ///
    /// # Errors
    /// If one of the variables is missing or is not a number, or `RANK` is not below `WORLD_SIZE`.
    pub fn from_env() -> Result<Option<Self>> {
        Self::from_variables(|name| std::env::var(name).ok())
    }

    fn from_variables(get: impl Fn(&str) -> Option<String>) -> Result<Option<Self>> {
        if get("RANK").is_none() && get("WORLD_SIZE").is_none() {
            return Ok(None);
        }
        let text = |name: &str| match get(name) {
            Some(text) => Ok(text),
            None => bail!("{name} is not set, but RANK or WORLD_SIZE is"),
        };
        let number = |name: &str| {
            let text = text(name)?;
            match text.trim().parse::<usize>() {
                Ok(number) => Ok(number),
                Err(_) => bail!("{name} must be a number, got {text:?}"),
            }
        };
        let port = |name: &str| match u16::try_from(number(name)?) {
            Ok(port @ 1..) => Ok(port),
            _ => bail!("{name} must be a port from 1 to 65535"),
        };
        let (rank, size, local_rank) = (
            number("RANK")?,
            number("WORLD_SIZE")?,
            number("LOCAL_RANK")?,
        );
        if rank >= size {
            bail!("RANK must be below WORLD_SIZE, got {rank} of {size}");
        }
        let host = text("MASTER_ADDR")?;
        let is_taken = get("TORCHELASTIC_USE_AGENT_STORE").is_some_and(|value| value == "True");
        let port = match (get(PORT), is_taken) {
            (Some(_), _) => port(PORT)?,
            (None, false) => port("MASTER_PORT")?,
            (None, true) => match port("MASTER_PORT")?.checked_add(1) {
                Some(port) => port,
                None => bail!("there is no port after MASTER_PORT: set {PORT}"),
            },
        };
        Ok(Some(Self {
            rank,
            size,
            local_rank,
            host,
            port,
        }))
    }

    /// The GPU of this process: number `local_rank`, or the only one that it can see.
    ///
    /// # Errors
    /// If there are fewer GPUs; if this crate was built without the feature `cuda`.
    pub fn cuda_device(&self) -> Result<Device> {
        #[cfg(feature = "cuda")]
        {
            let count = cudarc::driver::CudaContext::device_count();
            let count = count.map_err(|e| error(format_args!("no CUDA device: {e}")))?;
            Device::new_cuda(self.ordinal(count as usize)?)
        }
        #[cfg(not(feature = "cuda"))]
        bail!("built without CUDA: rebuild with --features cuda")
    }

    #[cfg(any(test, feature = "cuda"))]
    fn ordinal(&self, devices: usize) -> Result<usize> {
        match (self.local_rank, devices) {
            // Slurm can show each task its own GPU only.
            (_, 1) => Ok(0),
            (local_rank, devices) if local_rank < devices => Ok(local_rank),
            (local_rank, devices) => bail!(
                "rank {} has LOCAL_RANK {local_rank}, but its host has {devices} GPUs",
                self.rank
            ),
        }
    }

    /// This process alone.
    pub fn single() -> Self {
        Self {
            rank: 0,
            size: 1,
            local_rank: 0,
            host: String::new(),
            port: 0,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn world(variables: &str) -> Result<Option<World>> {
        let get = |wanted: &str| {
            let mut pairs = variables.split_whitespace();
            pairs.find_map(|pair| {
                let (name, value) = pair.split_once('=')?;
                (name == wanted).then(|| value.to_owned())
            })
        };
        World::from_variables(get)
    }

    const COMPLETE: &str = "RANK=3 WORLD_SIZE=8 LOCAL_RANK=1 MASTER_ADDR=node0 MASTER_PORT=29500";

    #[test]
    fn launchers_say_who_this_is() -> Result<()> {
        assert_eq!(world("MASTER_ADDR=node0 LOCAL_RANK=0")?, None);
        let expected = World {
            rank: 3,
            size: 8,
            local_rank: 1,
            host: "node0".to_owned(),
            port: 29500,
        };
        assert_eq!(world(COMPLETE)?, Some(expected.clone()));
        let port = |more: &str| -> Result<u16> {
            let world = world(&format!("{COMPLETE} {more}"))?;
            Ok(world.map_or(0, |world| world.port))
        };
        assert_eq!(port("TORCHELASTIC_USE_AGENT_STORE=True")?, 29501);
        assert_eq!(port("TORCHELASTIC_USE_AGENT_STORE=False")?, 29500);
        let both = "TORCHELASTIC_USE_AGENT_STORE=True HEB_PORT=4000";
        assert_eq!(port(both)?, 4000);
        Ok(())
    }

    #[test]
    fn the_local_rank_is_the_gpu() -> Result<()> {
        let rank = |local_rank| World {
            local_rank,
            ..World::single()
        };
        assert_eq!(rank(1).ordinal(2)?, 1);
        assert_eq!(rank(3).ordinal(1)?, 0);
        let error = rank(2).ordinal(2).unwrap_err().to_string();
        assert!(
            error.contains("LOCAL_RANK 2, but its host has 2 GPUs"),
            "{error}"
        );
        Ok(())
    }

    #[test]
    fn what_is_missing_or_wrong_is_named() {
        for (from, to, said) in [
            ("RANK=3 ", "", "RANK is not set"),
            ("LOCAL_RANK=1", "", "LOCAL_RANK is not set"),
            ("MASTER_ADDR=node0", "", "MASTER_ADDR is not set"),
            ("MASTER_PORT=29500", "", "MASTER_PORT is not set"),
            ("RANK=3", "RANK=-1", "RANK must be a number, got \"-1\""),
            (
                "RANK=3",
                "RANK=8",
                "RANK must be below WORLD_SIZE, got 8 of 8",
            ),
            ("=29500", "=70000", "MASTER_PORT must be a port"),
            ("=29500", "=0", "MASTER_PORT must be a port"),
            (
                "=29500",
                "=65535 TORCHELASTIC_USE_AGENT_STORE=True",
                "no port after MASTER_PORT: set HEB_PORT",
            ),
        ] {
            let variables = COMPLETE.replacen(from, to, 1);
            let error = world(&variables).unwrap_err().to_string();
            assert!(error.contains(said), "{variables}: {error}");
        }
    }
}
