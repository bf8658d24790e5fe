//! Several processes of the program `recommender` that train together on the CPU, and trainings that are killed and go on.

use std::fs;
use std::net::TcpListener;
use std::path::PathBuf;
use std::process::{Child, Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use safetensors::SafeTensors;
use tempfile::TempDir;

/// Far more than anything here takes.
const PATIENCE: Duration = Duration::from_secs(120);

/// A small model of a small log, in many steps.
const TRAIN: &str = "train --data log --format criteo --rows-per-field 500 --embedding-dim 4 --bottom-mlp 8 --top-mlp 8 \
    --bits 32 --epochs 2 --batch-size 40 --checkpoint";

/// A folder of a test's own with a click log.
struct Folder(TempDir);

impl Folder {
    fn new(lines: usize) -> Self {
        let folder = Self(tempfile::tempdir().unwrap());
        let generated = folder.command(&format!("generate log --lines {lines}"));
        succeeded(generated.spawn());
        folder
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    fn command(&self, arguments: &str) -> Process {
        let mut command = Command::new(env!("CARGO_BIN_EXE_recommender"));
        command
            .args(arguments.split_whitespace())
            .current_dir(self.0.path())
            .env("CANDLE_NUM_THREADS", "1")
            .env("RAYON_NUM_THREADS", "1")
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        for name in ["RANK", "WORLD_SIZE", "RUST_BACKTRACE"] {
            command.env_remove(name);
        }
        Process(command)
    }

    /// The same command as `ranks` processes.
    fn ranks(&self, ranks: usize, arguments: &str) -> Vec<Child> {
        let port = free_port();
        let rank = |rank| self.command(arguments).rank(rank, ranks, port).spawn();
        (0..ranks).map(rank).collect()
    }

    /// The values of all f32 tensors of a checkpoint.
    fn values(&self, checkpoint: &str) -> Vec<f32> {
        let bytes = fs::read(self.path(checkpoint)).unwrap();
        let tensors = SafeTensors::deserialize(&bytes).unwrap();
        let mut names = tensors.names();
        names.sort();
        let tensors = names.into_iter().map(|name| tensors.tensor(name).unwrap());
        let f32s = tensors.filter(|tensor| tensor.dtype() == safetensors::Dtype::F32);
        f32s.flat_map(|tensor| {
            let (values, _) = tensor.data().as_chunks();
            values
                .iter()
                .map(|v| f32::from_le_bytes(*v))
                .collect::<Vec<_>>()
        })
        .collect()
    }

    /// Waits until the state of a training has been saved that was not there before, and kills a process.
    #[track_caller]
    fn kill_after_a_save(&self, state: &str, process: &mut Child) {
        let modified = || {
            fs::metadata(self.path(state))
                .and_then(|m| m.modified())
                .ok()
        };
        let (before, start) = (modified(), Instant::now());
        while modified() == before {
            assert!(start.elapsed() < PATIENCE, "nothing is saved");
            assert!(process.try_wait().unwrap().is_none(), "it has ended");
            thread::sleep(Duration::from_millis(1));
        }
        process.kill().unwrap();
        process.wait().unwrap();
    }
}

struct Process(Command);

impl Process {
    fn rank(mut self, rank: usize, size: usize, port: u16) -> Self {
        self.0
            .env("RANK", rank.to_string())
            .env("LOCAL_RANK", rank.to_string())
            .env("WORLD_SIZE", size.to_string())
            .env("MASTER_ADDR", "localhost")
            .env("MASTER_PORT", port.to_string());
        self
    }

    fn spawn(mut self) -> Child {
        self.0.spawn().unwrap()
    }
}

fn free_port() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    listener.local_addr().unwrap().port()
}

/// What a process has printed.
#[track_caller]
fn succeeded(process: Child) -> String {
    let output = process.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", text(&output));
    String::from_utf8(output.stdout).unwrap()
}

/// What a process says before it fails, by an error and not by a panic.
#[track_caller]
fn failed(process: Child) -> String {
    let output = process.wait_with_output().unwrap();
    assert_eq!(output.status.code(), Some(1), "{}", text(&output));
    String::from_utf8(output.stderr).unwrap()
}

fn text(output: &Output) -> String {
    let (stdout, stderr) = (&output.stdout, &output.stderr);
    format!(
        "{} {}{}",
        output.status,
        String::from_utf8_lossy(stdout),
        String::from_utf8_lossy(stderr)
    )
}

/// The number that follows some words.
#[track_caller]
fn number_after(text: &str, words: &str) -> f64 {
    let (_, rest) = text
        .split_once(words)
        .unwrap_or_else(|| panic!("{words}: {text}"));
    let number = rest.split_whitespace().next().unwrap_or_default();
    number.parse().unwrap_or_else(|_| panic!("{words}: {text}"))
}

#[test]
fn two_ranks_train_as_one_does_on_the_same_batches() {
    let folder = Folder::new(2_003);
    for resident in ["", "--resident"] {
        compare_two_ranks_with_one(&folder, resident);
    }
}

#[track_caller]
fn compare_two_ranks_with_one(folder: &Folder, resident: &str) {
    let one = format!("{TRAIN} one --shards 2 {resident}");
    let one = succeeded(folder.command(&one).spawn());
    let mut two = folder.ranks(2, &format!("{TRAIN} two {resident}"));
    let (second, first) = (two.pop().unwrap(), two.pop().unwrap());
    let (first, second) = (succeeded(first), succeeded(second));
    assert!(second.is_empty(), "only rank 0 prints: {second}");
    assert!(first.contains("all-reduce"), "{first}");

    for what in ["epoch  1   train loss ", "epoch  2   train loss ", "test "] {
        let part = |text: &str| {
            text.split_once(what)
                .map(|(_, rest)| rest.to_owned())
                .unwrap()
        };
        let (one, two) = (part(&one), part(&first));
        let words = if what == "test " { "logloss " } else { "" };
        let (one, two) = (number_after(&one, words), number_after(&two, words));
        assert!((one - two).abs() < 2e-4, "{what}: {one} and {two}");
    }
    let (one, two) = (folder.values("one"), folder.values("two"));
    assert_eq!(one.len(), two.len());
    let distance: f64 = one
        .iter()
        .zip(&two)
        .map(|(a, b)| f64::from((a - b).abs()))
        .sum();
    let distance = distance / one.len() as f64;
    assert!(distance < 1e-4, "the parameters differ by {distance}");

    // The metrics of the ranks together are those of one process.
    let evaluate = "evaluate --data log --format criteo --checkpoint two";
    let evaluated = succeeded(folder.command(evaluate).spawn());
    let auc = number_after(&first[first.find("│ test").unwrap()..], "AUC ");
    assert!(
        evaluated.contains(&format!("{auc:.4}")),
        "{auc}: {evaluated}"
    );
}

#[test]
fn a_killed_training_ends_in_the_checkpoint_of_one_that_was_not() {
    let folder = Folder::new(3_000);
    let save = "--save-every 9";
    succeeded(folder.command(&format!("{TRAIN} whole")).spawn());
    succeeded(folder.command(&format!("{TRAIN} saved {save}")).spawn());
    let whole = fs::read(folder.path("whole")).unwrap();
    assert_eq!(fs::read(folder.path("saved")).unwrap(), whole);
    assert!(!folder.path("saved.resume").exists());

    for _ in 0..4 {
        let mut training = folder
            .command(&format!("{TRAIN} m {save} --resume"))
            .spawn();
        folder.kill_after_a_save("m.resume", &mut training);
    }
    let said = succeeded(
        folder
            .command(&format!("{TRAIN} m {save} --resume"))
            .spawn(),
    );
    assert!(said.contains("resumed at step"), "{said}");
    assert_eq!(fs::read(folder.path("m")).unwrap(), whole);
}

#[test]
fn ratings_resume_too() {
    let folder = Folder::new(10);
    let train = "train --compression 1/64 --epochs 3 --embedding-dim 4 --top-mlp 4 --checkpoint";
    succeeded(folder.command(&format!("{train} whole")).spawn());
    let arguments = format!("{train} m --save-every 300 --resume");
    let mut training = folder.command(&arguments).spawn();
    folder.kill_after_a_save("m.resume", &mut training);
    let mut training = folder.command(&arguments).spawn();
    folder.kill_after_a_save("m.resume", &mut training);
    let said = succeeded(folder.command(&arguments).spawn());
    assert!(said.contains("resumed at step"), "{said}");
    let files = ["m", "whole"].map(|name| fs::read(folder.path(name)).unwrap());
    assert!(files[0] == files[1]);
}

#[test]
fn a_rank_that_is_killed_ends_the_others_and_all_resume() {
    let folder = Folder::new(4_000);
    let train = |name| format!("{TRAIN} {name} --save-every 5 --resume --rank-timeout 60");
    for process in folder.ranks(2, &train("whole")) {
        succeeded(process);
    }
    for lost in [1, 0] {
        let mut ranks = folder.ranks(2, &train("m"));
        folder.kill_after_a_save("m.resume", &mut ranks[lost]);
        let start = Instant::now();
        let said = failed(ranks.swap_remove(1 - lost));
        assert!(start.elapsed() < Duration::from_secs(20));
        let expected = format!("rank {lost} (127.0.0.1) has ended before the others");
        assert!(said.contains(&expected), "{said}");
        assert!(!folder.path("m").exists());
    }
    for process in folder.ranks(2, &train("m")) {
        succeeded(process);
    }
    let files = ["m", "whole"].map(|name| fs::read(folder.path(name)).unwrap());
    assert!(files[0] == files[1]);
}

#[test]
fn ranks_with_other_options_or_data_are_refused_at_the_start() {
    let folder = Folder::new(500);
    fs::rename(folder.path("log"), folder.path("other")).unwrap();
    succeeded(folder.command("generate log --lines 600").spawn());
    for (arguments, said) in [
        (
            "m --lr 0.5",
            "rank 1 differs from rank 0: --lr is 0.5, not 0.002",
        ),
        ("m --data other", "rank 1 differs from rank 0: data is "),
        (
            "m --top-mlp 9",
            "rank 1 differs from rank 0: --top-mlp is [9], not [8]",
        ),
        (
            "m --save-every 5",
            "rank 1 differs from rank 0: --save-every is 5, not none",
        ),
    ] {
        let port = free_port();
        let options = |arguments: &str| {
            let mut options = format!("{TRAIN} {arguments}");
            // An option may be given once.
            if arguments.contains("--data") {
                options = options.replacen("--data log ", "", 1);
            }
            if arguments.contains("--top-mlp") {
                options = options.replacen("--top-mlp 8 ", "", 1);
            }
            options
        };
        let first = folder.command(&options("m")).rank(0, 2, port).spawn();
        let second = folder.command(&options(arguments)).rank(1, 2, port).spawn();
        for process in [first, second] {
            let error = failed(process);
            assert!(error.contains(said), "{arguments}: {error}");
        }
        assert!(!folder.path("m").exists());
    }
}

#[test]
fn launchers_may_hold_the_port_themselves() {
    let folder = Folder::new(500);
    let agent = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = agent.local_addr().unwrap().port();
    let command = |rank, port| folder.command(&format!("{TRAIN} m")).rank(rank, 2, port);

    // It says so.
    let ranks = [0, 1].map(|rank| {
        let mut process = command(rank, port);
        process.0.env("TORCHELASTIC_USE_AGENT_STORE", "True");
        process.spawn()
    });
    ranks.into_iter().for_each(|rank| drop(succeeded(rank)));
    // It does not, and is in the way.
    let said = failed(command(0, port).spawn());
    let expected = format!("port {port} is in use: set HEB_PORT to one that is free");
    assert!(said.contains(&expected), "{said}");
}

#[test]
fn what_cannot_be_done_is_refused_by_name() {
    let folder = Folder::new(500);
    let train = format!("{TRAIN} m");
    let said = failed(folder.command(&format!("{TRAIN} m --shards 3")).spawn());
    assert!(said.contains("must be a multiple of 3, got 40"), "{said}");
    let mut command = folder.command("evaluate --data log --format criteo --checkpoint m");
    command = command.rank(0, 2, free_port());
    let said = failed(command.spawn());
    assert!(
        said.contains("only `train` runs on several ranks"),
        "{said}"
    );
    let mut command = folder.command(&train);
    command.0.env("WORLD_SIZE", "2");
    let said = failed(command.spawn());
    assert!(said.contains("RANK is not set"), "{said}");

    // A state of another training, or none.
    let arguments = format!("{train} --save-every 3").replacen("--epochs 2", "--epochs 900", 1);
    let mut training = folder.command(&arguments).spawn();
    folder.kill_after_a_save("m.resume", &mut training);
    let said = failed(folder.command(&format!("{train} --resume")).spawn());
    assert!(
        said.contains("cannot resume from m.resume")
            && said.contains("--epochs was 900 and is now 2"),
        "{said}"
    );
    fs::write(folder.path("m.resume"), "nothing").unwrap();
    let said = failed(folder.command(&format!("{train} --resume")).spawn());
    assert!(said.contains("cannot resume from m.resume"), "{said}");
}
