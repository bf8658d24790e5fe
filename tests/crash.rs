//! What is left of a checkpoint when saving it is killed, or the disk is full: the old file or the new one, whole.
#![cfg(unix)]

mod common;

use candle_core::{DType, Device, Result, Tensor};
use candle_hashed_embedding_bag::{checkpoint, Checkpoint, HashedEmbeddingBag};
use common::{message, Draws};
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

/// The file that the child process of a test saves to.
const FILE: &str = "CANDLE_HASHED_EMBEDDING_BAG_CHILD_FILE";
const KILLS: usize = 200;
/// Half a megabyte: a save is long enough to be hit at every step.
const LEN: usize = 1 << 17;

/// Saves a model all of whose values are `version`.
fn save(path: &Path, version: i64, len: usize) -> Result<()> {
    let device = &Device::Cpu;
    let weight = Tensor::full(version as f32, len, device)?;
    let layer = HashedEmbeddingBag::new(weight, 1 << 20, 4, Default::default())?;
    let tensors = [("version".to_string(), Tensor::new(version, device)?)];
    checkpoint::save(path, tensors, [("a", &layer)])
}

/// The version of the model, which must be whole.
fn load(path: &Path) -> Result<i64> {
    let (checkpoint, device) = (Checkpoint::open(path)?, &Device::Cpu);
    let version = checkpoint.tensor("version", device)?.to_scalar::<i64>()?;
    let layer = checkpoint.hashed_embedding_bag("a", DType::F32, device)?;
    let values = layer.hashed_weight().to_vec1::<f32>()?;
    assert!(
        values.iter().all(|&value| value == version as f32),
        "of two versions"
    );
    Ok(version)
}

/// The file of a child process.
fn file() -> std::path::PathBuf {
    std::env::var_os(FILE).expect("run by another test").into()
}

/// This binary, to run the ignored test `name` only.
fn arguments(name: &str) -> [&str; 4] {
    ["--ignored", "--exact", "--nocapture", name]
}

#[test]
#[ignore = "a child process of a_killed_save_leaves_a_whole_file"]
fn save_until_killed() -> Result<()> {
    let path = file();
    for version in load(&path)? + 1.. {
        save(&path, version, LEN)?;
        println!("saved");
    }
    Ok(())
}

#[test]
fn a_killed_save_leaves_a_whole_file() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let path = folder.path().join("model.safetensors");
    save(&path, 0, LEN)?;
    let mut draws = Draws::new(1);
    let (mut version, mut hit) = (0, 0);
    for _ in 0..KILLS {
        let mut child = Command::new(std::env::current_exe()?)
            .args(arguments("save_until_killed"))
            .env(FILE, &path)
            .stdout(Stdio::piped())
            .spawn()?;
        // Held until the end: a child that cannot print ends by itself.
        let mut output = BufReader::new(child.stdout.take().expect("it is piped")).lines();
        let saves = output.any(|line| line.is_ok_and(|line| line.ends_with("saved")));
        assert!(saves, "the child saves");
        // A reader meanwhile sees whole files too, each at least as new as the one before.
        let until = Instant::now() + Duration::from_micros(draws.below(10_000) as u64);
        while Instant::now() < until {
            let seen = load(&path)?;
            assert!(seen >= version, "{seen} after {version}");
            version = seen;
        }
        child.kill()?;
        child.wait()?;
        let left = load(&path)?;
        assert!(left > 0 && left >= version, "{left} after {version}");
        version = left;
        // What the kill left behind is a file of another name.
        let mut others = std::fs::read_dir(folder.path())?
            .map(|entry| entry.map(|entry| entry.path()))
            .collect::<std::io::Result<Vec<_>>>()?;
        others.retain(|other| *other != path);
        hit += usize::from(!others.is_empty());
        for other in others {
            std::fs::remove_file(other)?;
        }
    }
    println!("{hit} of {KILLS} kills in the middle of a save; {version} saves");
    assert!(
        hit > KILLS / 10,
        "{hit} of {KILLS} kills in the middle of a save"
    );
    Ok(())
}

#[test]
#[ignore = "a child process of a_full_disk_leaves_the_old_file"]
fn save_with_little_room() -> Result<()> {
    let path = file();
    save(&path, 1, 16)?;
    let refused = message(save(&path, 2, LEN));
    println!("refused: {refused}");
    assert!(
        refused.contains("No space left on device") || refused.contains("File too large"),
        "{refused}"
    );
    assert_eq!(load(&path)?, 1);
    let folder = path.parent().expect("a file in a folder");
    assert_eq!(
        std::fs::read_dir(folder)?.count(),
        1,
        "nothing else is left"
    );
    // Where there is room, it goes on.
    save(&path, 3, 16)?;
    assert_eq!(load(&path)?, 3);
    Ok(())
}

/// A file system of 64 KiB, where one may be mounted, and a limit on the length of files, which every system has.
#[test]
fn a_full_disk_leaves_the_old_file() -> Result<()> {
    let folder = tempfile::tempdir()?;
    let run = |namespace: &[&str], before: &str| -> Result<std::process::Output> {
        let script = format!("{before} && exec \"$@\"");
        let shell = ["sh", "-c", &script, "sh"];
        let command = [namespace, &shell].concat();
        Ok(Command::new(command[0])
            .args(&command[1..])
            .arg(std::env::current_exe()?)
            .args(arguments("save_with_little_room"))
            .env(FILE, folder.path().join("model.safetensors"))
            .env("FOLDER", folder.path())
            .output()?)
    };
    let assert_refused = |output: std::process::Output| {
        let said = String::from_utf8_lossy(&output.stdout).into_owned();
        let complaints = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(output.status.success(), "{said}{complaints}");
        assert!(said.contains("refused: "), "{said}{complaints}");
    };
    // Past the limit a process gets a signal, which kills it unless ignored.
    assert_refused(run(&[], "trap '' XFSZ && ulimit -f 64")?);

    let namespace = ["unshare", "--map-root-user", "--mount"];
    let mount = "mount -t tmpfs -o size=64k tmpfs \"$FOLDER\"";
    let can_mount = Command::new(namespace[0])
        .args(&namespace[1..])
        .args(["sh", "-c", mount])
        .env("FOLDER", folder.path())
        .status();
    if can_mount.is_ok_and(|status| status.success()) {
        assert_refused(run(&namespace, mount)?);
    } else {
        eprintln!("full file system skipped: none can be mounted");
    }
    Ok(())
}
