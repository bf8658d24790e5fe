//! What the process uses, by the names that Prometheus' own clients give it. Only Linux tells.

use std::fmt;

use prometheus_client::collector::Collector;
use prometheus_client::encoding::{DescriptorEncoder, EncodeMetric};
use prometheus_client::metrics::counter::ConstCounter;
use prometheus_client::metrics::gauge::ConstGauge;
use prometheus_client::registry::Unit;

/// Reads the metrics of the process whenever they are asked for.
#[derive(Debug)]
pub struct Process;

/// The values of a moment.
struct Usage {
    cpu_seconds: f64,
    start_seconds: f64,
    resident_bytes: f64,
    virtual_bytes: f64,
    threads: f64,
    open_files: f64,
    max_files: f64,
}

impl Collector for Process {
    fn encode(&self, mut encoder: DescriptorEncoder) -> Result<(), fmt::Error> {
        let Some(usage) = Usage::now() else {
            return Ok(());
        };
        let cpu = ConstCounter::new(usage.cpu_seconds);
        let (name, help) = ("process_cpu", "User and system time");
        let metric =
            encoder.encode_descriptor(name, help, Some(&Unit::Seconds), cpu.metric_type())?;
        cpu.encode(metric)?;
        let gauges = [
            (
                "process_start_time",
                "Start, since the epoch of Unix",
                Some(Unit::Seconds),
                usage.start_seconds,
            ),
            (
                "process_resident_memory",
                "Memory in use",
                Some(Unit::Bytes),
                usage.resident_bytes,
            ),
            (
                "process_virtual_memory",
                "Address space in use",
                Some(Unit::Bytes),
                usage.virtual_bytes,
            ),
            ("process_threads", "Threads", None, usage.threads),
            (
                "process_open_fds",
                "Open file descriptors",
                None,
                usage.open_files,
            ),
            (
                "process_max_fds",
                "Limit of open file descriptors",
                None,
                usage.max_files,
            ),
        ];
        for (name, help, unit, value) in gauges {
            let gauge = ConstGauge::new(value);
            let metric =
                encoder.encode_descriptor(name, help, unit.as_ref(), gauge.metric_type())?;
            gauge.encode(metric)?;
        }
        Ok(())
    }
}

#[cfg(target_os = "linux")]
impl Usage {
    fn now() -> Option<Self> {
        use procfs::process::{LimitValue, Process};
        use procfs::{CurrentSI, WithCurrentSystemInfo};

        let process = Process::myself().ok()?;
        let stat = process.stat().ok()?;
        let files = process.limits().ok()?.max_open_files.soft_limit;
        let per_second = procfs::ticks_per_second() as f64;
        let start = procfs::KernelStats::current().ok()?.btime as f64;
        Some(Self {
            cpu_seconds: (stat.utime + stat.stime) as f64 / per_second,
            start_seconds: start + stat.starttime as f64 / per_second,
            resident_bytes: stat.rss_bytes().get() as f64,
            virtual_bytes: stat.vsize as f64,
            threads: stat.num_threads as f64,
            open_files: process.fd_count().ok()? as f64,
            max_files: match files {
                LimitValue::Value(files) => files as f64,
                LimitValue::Unlimited => f64::INFINITY,
            },
        })
    }
}

#[cfg(not(target_os = "linux"))]
impl Usage {
    fn now() -> Option<Self> {
        None
    }
}
