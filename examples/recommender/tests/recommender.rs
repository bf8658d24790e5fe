//! The program `recommender` as a process: what it makes of odd data, of outputs that cannot be written, and of mistakes.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use tempfile::TempDir;

/// A folder of a test's own, in which its commands run.
struct Folder(TempDir);

impl Folder {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }

    fn path(&self, name: &str) -> PathBuf {
        self.0.path().join(name)
    }

    /// A MovieLens set in the folder `name`: eighteen ratings of two movies, which `movies` describes.
    fn movielens(&self, name: &str, movies: &str) {
        let ratings: String = (1..=18)
            .map(|i| format!("{},{},{}.0,1\n", i % 3 + 1, i % 2 + 1, i % 5 + 1))
            .collect();
        fs::create_dir_all(self.path(name)).unwrap();
        let file = |file: &str| self.path(name).join(file);
        fs::write(
            file("movies.csv"),
            format!("movieId,title,genres\n{movies}"),
        )
        .unwrap();
        let header = "userId,movieId,rating,timestamp";
        fs::write(file("ratings.csv"), format!("{header}\n{ratings}")).unwrap();
    }

    fn plain_movielens(&self) {
        self.movielens("ml", "1,Alien (1979),Horror\n2,Brazil (1985),Comedy\n");
    }

    /// A click log of 500 lines, sorted by label if wanted, so that its valid and test parts have one class.
    fn click_log(&self, sorted: bool) {
        self.succeeds("generate log --lines 500");
        if sorted {
            let text = fs::read_to_string(self.path("log")).unwrap();
            let mut lines: Vec<_> = text.lines().collect();
            lines.sort_unstable_by(|a, b| b.cmp(a));
            fs::write(self.path("log"), lines.join("\n")).unwrap();
        }
    }

    fn command(&self, arguments: &str) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_recommender"));
        command
            .args(arguments.split_whitespace())
            .current_dir(self.0.path())
            .stdin(Stdio::null());
        command
    }

    /// What a command prints.
    #[track_caller]
    fn succeeds(&self, arguments: &str) -> String {
        let output = self.command(arguments).output().unwrap();
        assert!(output.status.success(), "{arguments}: {output:?}");
        String::from_utf8(output.stdout).unwrap()
    }

    /// What a command says before it fails, on standard output and on standard error. It fails by an error, not by a panic.
    #[track_caller]
    fn fails(&self, arguments: &str) -> (String, String) {
        failure(self.command(arguments).output().unwrap())
    }
}

#[track_caller]
fn failure(output: Output) -> (String, String) {
    let (stdout, stderr) = (
        String::from_utf8(output.stdout).unwrap(),
        String::from_utf8(output.stderr).unwrap(),
    );
    // 1 is an error and 2 a command line that is not understood; a panic is 101.
    let code = output.status.code();
    assert!(matches!(code, Some(1 | 2)), "{code:?} {stdout} {stderr}");
    (stdout, stderr)
}

/// The smallest and quickest training there is.
const TRAIN: &str = "--data ml --compression 1 --epochs 2 --checkpoint m";

#[test]
fn a_closed_standard_output_costs_no_training() {
    let folder = Folder::new();
    folder.plain_movielens();
    let mut process = folder
        .command(TRAIN)
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop(process.stdout.take());
    let output = process.wait_with_output().unwrap();
    assert!(
        output.status.success() && output.stderr.is_empty(),
        "{output:?}"
    );
    folder.succeeds("recommend --user 1 --data ml --checkpoint m");
}

/// A full disk is not a reader who has left: the model is saved, and the failure reported.
#[cfg(target_os = "linux")]
#[test]
fn a_standard_output_that_fails_is_reported_at_the_end() {
    let folder = Folder::new();
    folder.plain_movielens();
    let full = fs::File::options().write(true).open("/dev/full").unwrap();
    let output = folder.command(TRAIN).stdout(full).output().unwrap();
    let (_, said) = failure(output);
    assert!(said.contains("standard output"), "{said}");
    folder.succeeds("recommend --user 1 --data ml --checkpoint m");
}

#[test]
fn tables_are_rounded_in_the_checkpoint() {
    let folder = Folder::new();
    folder.plain_movielens();
    folder.succeeds(&format!("{TRAIN} --bits 32"));
    let exact = fs::metadata(folder.path("m")).unwrap().len();
    for bits in [8, 4] {
        let said = folder.succeeds(&format!("{TRAIN} --bits {bits}"));
        assert!(said.contains(&format!("test, {bits} bits")), "{said}");
        assert!(said.contains("relative error of rounding"), "{said}");
        assert!(fs::metadata(folder.path("m")).unwrap().len() < exact);
        folder.succeeds("recommend --user 1 --data ml --checkpoint m");
        folder.succeeds("evaluate --data ml --checkpoint m");
    }
    let (_, said) = folder.fails(&format!("{TRAIN} --bits 5"));
    assert!(said.contains("it must be 32, 8 or 4"), "{said}");
}

/// The row of a table with these first cells.
fn row<'a>(printed: &'a str, first: &str) -> Vec<&'a str> {
    let rows = printed.lines().map(|line| {
        let cells = line.split(['│', '┆']).map(str::trim);
        cells.filter(|cell| !cell.is_empty()).collect::<Vec<_>>()
    });
    let mut found = rows.filter(|cells| cells.first() == Some(&first));
    found
        .next()
        .unwrap_or_else(|| panic!("no {first}: {printed}"))
}

#[test]
fn a_model_is_evaluated_beside_baselines() {
    let folder = Folder::new();
    folder.plain_movielens();
    folder.succeeds(TRAIN);
    let printed = folder.succeeds("evaluate --data ml --checkpoint m");
    // Whatever they liked they had rated before: nothing is left to be ranked.
    assert_eq!(row(&printed, "test"), ["test", "AUC", "logloss"]);
    for name in ["model", "popularity", "constant"] {
        assert_eq!(row(&printed, name).len(), 3, "{printed}");
    }
}

#[test]
fn rare_movies_share_a_row() {
    let folder = Folder::new();
    // Nobody rated the last two, of which nothing else is known.
    let movies = "1,Alien,Horror\n2,Brazil,Comedy\n3,Cube,\n4,Dune,\n";
    folder.movielens("ml", movies);
    folder.succeeds(&format!("{TRAIN} --min-count 1"));
    let printed = folder.succeeds("recommend --user 1 --data ml --checkpoint m");
    assert_eq!(row(&printed, "1")[1..], ["Cube", row(&printed, "2")[2]]);
    assert_eq!(row(&printed, "2")[1], "Dune");
}

#[test]
fn every_line_of_a_log_is_scored() {
    let folder = Folder::new();
    folder.click_log(false);
    folder.succeeds("--data log --format criteo --rows-per-field 100 --checkpoint m");
    let scored = folder.succeeds("score log --checkpoint m");
    let probabilities: Vec<&str> = scored.lines().collect();
    assert_eq!(probabilities.len(), 500);
    let is_probability = |p: &&&str| (0.0..1.0).contains(&p.parse::<f64>().unwrap());
    assert_eq!(probabilities.iter().filter(is_probability).count(), 500);

    // Labels do not matter, nor whether it is a file.
    let log = fs::read_to_string(folder.path("log")).unwrap();
    let unlabelled = log.lines().map(|line| line[2..].to_owned() + "\n");
    let unlabelled = unlabelled.collect::<String>();
    fs::write(folder.path("unlabelled"), &unlabelled).unwrap();
    assert_eq!(folder.succeeds("score unlabelled --checkpoint m"), scored);
    assert_eq!(folder.succeeds("score log --checkpoint m --out p"), "");
    assert_eq!(fs::read_to_string(folder.path("p")).unwrap(), scored);
    if Path::new("/dev/stdin").exists() {
        let mut process = folder
            .command("score - --checkpoint m")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut stdin = process.stdin.take().unwrap();
        stdin.write_all(unlabelled.as_bytes()).unwrap();
        drop(stdin);
        let output = process.wait_with_output().unwrap();
        assert_eq!(String::from_utf8(output.stdout).unwrap(), scored);
    }

    // A line that is malformed keeps its place.
    let mut lines: Vec<_> = log.lines().collect();
    lines.insert(3, "not a click");
    lines.insert(400, "1\t2");
    fs::write(folder.path("bad"), lines.join("\n")).unwrap();
    let (_, said) = folder.fails("score bad --checkpoint m");
    assert!(said.contains("bad:4: expected 40 fields, got 1"), "{said}");
    let skipped = folder.succeeds("score bad --skip-malformed --checkpoint m");
    let mut expected = probabilities;
    expected.insert(3, "");
    expected.insert(400, "");
    assert_eq!(skipped.lines().collect::<Vec<_>>(), expected);
}

#[test]
fn pairs_are_scored() {
    let folder = Folder::new();
    folder.plain_movielens();
    folder.succeeds(TRAIN);
    // The ratings are pairs, too.
    let scored = folder.succeeds("score ml/ratings.csv --checkpoint m");
    let scored: Vec<&str> = scored.lines().collect();
    assert_eq!(scored.len(), 18);
    // Of three users and two movies.
    assert_eq!(scored[..6], scored[6..12]);
    fs::write(folder.path("pairs"), "2 2\n9 2\nx 2\n").unwrap();
    let pairs = folder.succeeds("score pairs --checkpoint m");
    let pairs: Vec<&str> = pairs.lines().collect();
    assert_eq!(pairs[0], scored[0]);
    assert_eq!(pairs[1], pairs[2], "users of whom nothing is known");

    let printed = folder.succeeds("recommend --user 9 -k 1 --data ml --checkpoint m");
    assert!(
        printed.contains("no user 9: the model knows 3 users"),
        "{printed}"
    );
    assert_eq!(row(&printed, "1").len(), 4);
    assert!(!printed.contains("\n│ 2"), "{printed}");
}

#[test]
fn a_model_is_evaluated_on_any_part_of_any_data() {
    let folder = Folder::new();
    folder.click_log(false);
    folder.succeeds("generate tomorrow --lines 300 --seed 2");
    let criteo = "--format criteo --rows-per-field 100";
    folder.succeeds(&format!("--data log {criteo} --checkpoint m"));
    let evaluate = |arguments: &str| {
        let printed = folder.succeeds(&format!("evaluate --checkpoint m {arguments}"));
        let header = printed.lines().find(|line| line.contains("AUC")).unwrap();
        let part = header.split(['│', '┆']).nth(1).unwrap().trim().to_owned();
        (part, row(&printed, "model").join(" "))
    };
    let criteo = "--format criteo --data";
    let (part, test) = evaluate(&format!("{criteo} log"));
    assert_eq!(part, "test");
    assert_eq!(evaluate(&format!("{criteo} log --part test")).1, test);
    assert_ne!(evaluate(&format!("{criteo} log --part train")).1, test);
    assert_eq!(evaluate(&format!("{criteo} tomorrow")).0, "all");
    assert_eq!(
        evaluate(&format!("{criteo} tomorrow --part valid")).0,
        "valid"
    );

    folder.plain_movielens();
    folder.succeeds(TRAIN);
    // One more user and movie, which the model does not know.
    let movies = "1,Alien (1979),Horror\n2,Brazil (1985),Comedy\n3,Cube,\n";
    folder.movielens("other", movies);
    let ratings = folder.path("other").join("ratings.csv");
    let more = fs::read_to_string(&ratings).unwrap() + "1,3,4.0,1\n9,1,4.0,1\n";
    fs::write(ratings, more).unwrap();
    let printed = folder.succeeds("evaluate --data other --checkpoint m");
    assert!(printed.contains("2 ratings are left out"), "{printed}");
    assert_eq!(row(&printed, "all")[1], "AUC");
}

/// How many epochs were trained.
fn epochs(printed: &str) -> usize {
    let lines = printed.lines().filter(|line| line.contains("train loss"));
    lines.count()
}

#[test]
fn a_training_ends_when_it_gets_no_better() {
    let folder = Folder::new();
    folder.plain_movielens();
    let train = "--data ml --compression 1 --epochs 200 --lr 0.05 --checkpoint m";
    let printed = folder.succeeds(&format!("{train} --patience 2"));
    assert!(
        printed.contains("no better epoch for 2: the training ends"),
        "{printed}"
    );
    let trained = epochs(&printed);
    assert!(trained < 200, "{printed}");
    let best: usize = row(&printed, "best epoch")[1].parse().unwrap();
    assert_eq!(best, trained - 2);
}

#[test]
fn a_training_begins_where_another_ended() {
    let folder = Folder::new();
    folder.click_log(false);
    let criteo = "--data log --format criteo --rows-per-field 100";
    let train = |more: &str| folder.succeeds(&format!("{criteo} {more}"));
    let first = train("--epochs 4 --bits 32 --checkpoint first");
    let next = train("--epochs 1 --warm-start first --checkpoint next");
    let losses = |printed: &str| -> Vec<f64> {
        let rest = printed
            .lines()
            .filter_map(|line| line.split_once("train loss "));
        rest.map(|(_, rest)| rest.split_whitespace().next().unwrap().parse().unwrap())
            .collect()
    };
    // Far below where the first began.
    assert!(losses(&next)[0] < losses(&first)[1], "{first}{next}");

    for (more, said) in [
        (
            "--warm-start next",
            "only those of --bits 32 can be trained further",
        ),
        (
            "--warm-start first --compression 1/4",
            "its tensor hashed.hashed_weight has the shape",
        ),
        (
            "--warm-start first --rows-per-field 99",
            "its tables are other ones",
        ),
        ("--warm-start first --top-mlp 8", "its tensor top."),
        ("--warm-start none", "cannot open the checkpoint none"),
    ] {
        let log = "--data log --format criteo";
        let rows = if more.contains("rows") {
            ""
        } else {
            "--rows-per-field 100"
        };
        let (_, error) = folder.fails(&format!("{log} {rows} {more} --checkpoint other"));
        assert!(error.contains(said), "{more}: {error}");
    }

    // Signatures of other records lead to other slots.
    let alike = "--hash semantic --epochs 1 --bits 32";
    train(&format!("{alike} --checkpoint alike"));
    train(&format!("{alike} --warm-start alike --checkpoint again"));
    let log = fs::read_to_string(folder.path("log")).unwrap();
    let later: Vec<_> = log.lines().skip(50).collect();
    fs::write(folder.path("log"), later.join("\n") + "\n").unwrap();
    let more = format!("{alike} --warm-start alike --checkpoint other");
    let (_, error) = folder.fails(&format!("{criteo} {more}"));
    assert!(
        error.contains("its signatures were made of other records"),
        "{error}"
    );
}

#[test]
fn ratings_may_be_divided_by_time() {
    let folder = Folder::new();
    folder.plain_movielens();
    folder.succeeds(&format!("{TRAIN} --split time --like-from 3"));
    let printed = folder.succeeds("evaluate --data ml --checkpoint m");
    assert_eq!(row(&printed, "test")[0], "test");
    let (_, said) = folder.fails("--split time --checkpoint m");
    assert!(
        said.contains("--like-from and --split need --data"),
        "{said}"
    );
}

#[test]
fn a_log_shows_progress() {
    let folder = Folder::new();
    folder.click_log(false);
    let train = "--data log --format criteo --rows-per-field 100 --epochs 1 --checkpoint m";
    let output = folder
        .command(&format!("{train} --progress-seconds 0"))
        .output()
        .unwrap();
    let said = String::from_utf8(output.stderr).unwrap();
    assert!(said.contains("epoch 1: 100 % in 0 s, loss "), "{said}");
    let quiet = folder.command(train).output().unwrap();
    assert!(quiet.stderr.is_empty(), "{quiet:?}");
}

#[test]
fn a_divergence_is_an_error_that_replaces_no_model() {
    let folder = Folder::new();
    folder.plain_movielens();
    folder.succeeds(TRAIN);
    let good = fs::read(folder.path("m")).unwrap();
    let (_, said) = folder.fails(&format!("{TRAIN} --batch-size 1 --lr 1e30"));
    assert!(said.contains("training diverged in epoch 1"), "{said}");
    assert_eq!(fs::read(folder.path("m")).unwrap(), good);

    let sweep = "sweep --data ml --sizes 1 --seeds 1 --epochs 1 --batch-size 1 --lr 1e30";
    let (_, said) = folder.fails(sweep);
    assert!(
        said.contains("plain, no matrices, compression 1, seed 1") && said.contains("diverged"),
        "{said}"
    );
}

#[test]
fn outputs_that_cannot_be_written_are_refused_before_the_work() {
    let folder = Folder::new();
    folder.plain_movielens();
    folder.click_log(false);
    fs::create_dir(folder.path("auc-vs-size.svg")).unwrap();
    // Leads to a folder that does not exist.
    #[cfg(unix)]
    std::os::unix::fs::symlink("no/such/m", folder.path("link")).unwrap();
    for (arguments, said) in [
        ("--data ml --checkpoint no/such/m", "cannot write no/such/m"),
        (
            "--data ml --checkpoint ml",
            "path: \"ml\" not a regular file",
        ),
        ("--data ml --checkpoint log/m", "cannot write log/m"),
        #[cfg(unix)]
        ("--data ml --checkpoint link", "cannot write link"),
        #[cfg(unix)]
        ("--data ml --checkpoint /dev/null", "cannot write /dev/null"),
        ("sweep --data ml", "cannot write ./auc-vs-size.svg"),
        ("sweep --data ml --out log", "cannot make log"),
        ("generate no/such/log", "cannot write no/such/log"),
    ] {
        let (printed, error) = folder.fails(arguments);
        assert!(printed.is_empty(), "{arguments}: {printed}");
        assert!(error.contains(said), "{arguments}: {error}");
    }
}

#[test]
fn any_names_train_and_open_again() {
    let folder = Folder::new();
    for (movies, left_out) in [
        // A newline in a genre, and a backslash before an n.
        (
            "1,A (1995),\"Drama\nComedy\"\n2,B (1995),War\\news|\\\n",
            None,
        ),
        // No title word comes twice.
        ("1,Alien,Drama\n2,Brazil,Comedy\n", Some("words")),
        // No movie has a genre.
        (
            "1,A (1995),(no genres listed)\n2,B (1995),\n",
            Some("genres"),
        ),
        ("1,Alien,\n2,Brazil,\n", Some("genres, words")),
    ] {
        folder.movielens("ml", movies);
        let printed = folder.succeeds(TRAIN);
        let line = printed.lines().find(|line| line.contains("left out"));
        match left_out {
            None => assert_eq!(line, None),
            Some(names) => assert!(line.unwrap().contains(&format!("{names}: ")), "{printed}"),
        }
        folder.succeeds("recommend --user 1 --data ml --checkpoint m");
        folder.succeeds("evaluate --data ml --checkpoint m");
    }
}

#[test]
fn a_click_log_from_a_pipe_is_refused_at_once() {
    if !Path::new("/dev/stdin").exists() {
        return println!("skipped: no /dev/stdin");
    }
    let folder = Folder::new();
    // Its other end stays open, and nothing is written to it: whoever reads from it waits.
    let mut process = folder
        .command("--data /dev/stdin --format criteo --checkpoint m")
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let pipe = process.stdin.take();
    let (_, said) = failure(process.wait_with_output().unwrap());
    assert!(said.contains("must be a regular file"), "{said}");
    drop(pipe);
}

#[test]
fn one_class_is_judged_by_logloss() {
    let folder = Folder::new();
    folder.click_log(true);
    let criteo = "--data log --format criteo --rows-per-field 100";
    let printed = folder.succeeds(&format!("{criteo} --epochs 3 --checkpoint m"));
    assert!(
        printed.contains("the epoch is chosen by logloss"),
        "{printed}"
    );
    let loglosses: Vec<&str> = printed
        .lines()
        .filter_map(|line| line.split_once("valid logloss "))
        .filter_map(|(_, rest)| rest.split_whitespace().next())
        .collect();
    let best = printed
        .lines()
        .find_map(|line| line.split_once("best epoch"))
        .and_then(|(_, rest)| rest.chars().find_map(|c| c.to_digit(10)))
        .unwrap() as usize;
    assert_eq!(loglosses.len(), 3, "{printed}");
    assert_eq!(loglosses.iter().min(), loglosses.get(best - 1), "{printed}");
    assert!(!printed.contains("NaN"), "{printed}");
    let evaluated = folder.succeeds("evaluate --data log --format criteo --checkpoint m");
    assert!(evaluated.contains("no AUC"), "{evaluated}");

    let sweep = format!(
        "sweep {criteo} --sizes 1/4 --hashes default,original --inner-dims none --bits 32 --seeds 1"
    );
    for printed in [folder.succeeds(&sweep), folder.succeeds(&sweep)] {
        assert!(printed.contains("test logloss, mean"), "{printed}");
        assert!(
            !printed.contains("NaN") && !printed.contains("inf"),
            "{printed}"
        );
        assert!(
            printed.lines().all(|line| line.chars().count() < 140),
            "{printed}"
        );
    }
}

#[test]
fn a_sweep_knows_its_data_again() {
    let folder = Folder::new();
    folder.click_log(false);
    let sweep = "sweep --data log --format criteo --rows-per-field 100 --sizes 1/4 --inner-dims none --bits 32 --seeds 1";
    let trained = |printed: String| printed.lines().filter(|l| l.contains(", seed ")).count();
    assert_eq!(trained(folder.succeeds(sweep)), 2);
    assert_eq!(trained(folder.succeeds(sweep)), 0);
    // Cut off in its last line, as by a kill.
    let csv = fs::read_to_string(folder.path("auc-vs-size.csv")).unwrap();
    fs::write(folder.path("auc-vs-size.csv"), &csv[..csv.len() - 30]).unwrap();
    let printed = folder.succeeds(sweep);
    assert!(
        printed.contains("was cut off: its run is repeated"),
        "{printed}"
    );
    assert_eq!(trained(printed), 1);
    // Other clicks at the same path.
    folder.succeeds("generate log --lines 500 --seed 2");
    assert_eq!(trained(folder.succeeds(sweep)), 2);
    assert_eq!(trained(folder.succeeds(sweep)), 0);
    let csv = fs::read_to_string(folder.path("auc-vs-size.csv")).unwrap();
    assert_eq!(csv.lines().count(), 5);
}

/// Trainings side by side yield what they yield one after the other, and models that differ only in their bits are trained once.
#[test]
fn jobs_do_not_change_a_sweep() {
    let folder = Folder::new();
    folder.click_log(false);
    let sweep = "sweep --data log --format criteo --rows-per-field 100 --sizes 1/2,1/8 --inner-dims none,4 --bits 32,4 --seeds 2";
    let printed = folder.succeeds(&format!("{sweep} --out one"));
    assert_eq!(
        printed.lines().filter(|l| l.contains(", seed ")).count(),
        12
    );
    folder.succeeds(&format!("{sweep} --jobs 3 --out side"));
    let runs = |out: &str| {
        let csv = fs::read_to_string(folder.path(out).join("auc-vs-size.csv")).unwrap();
        let mut lines: Vec<_> = csv
            .lines()
            .map(|line| line.rsplit_once(',').unwrap().0.to_owned())
            .collect();
        lines.sort_unstable();
        lines
    };
    assert_eq!(runs("one"), runs("side"));
    // A header and two seeds of eight models: in f32, plain ones with 16 columns and with 4 of them, and hashed ones of each size with
    // 16 and of the smaller with 4; in 4 bits, the plain ones, and one that is hashed.
    assert_eq!(runs("one").len(), 17, "{:?}", runs("one"));
    for out in ["one", "side"] {
        assert!(folder.path(out).join("auc-vs-size.svg").exists());
        let again = folder.succeeds(&format!("{sweep} --jobs 3 --out {out}"));
        assert!(!again.contains("trainings"), "{again}");
    }
    let (_, said) = folder.fails(&format!("{sweep} --jobs 2 --lr 1e30 --out failed"));
    assert!(
        said.contains("diverged") && said.contains(", seed "),
        "{said}"
    );
}

/// Fifty users with a dozen of 200 items each.
fn interactions() -> String {
    let user = |user: u32| {
        let items =
            (0..12).map(|i| format!(" {}", 500 + (user * 7 + i * i * (1 + user % 3)) % 200));
        let mut items: Vec<_> = items.collect();
        items.sort_unstable();
        items.dedup();
        format!("{}{}\n", 10 * user, items.concat())
    };
    (0..50).map(user).collect()
}

#[test]
fn interactions_are_learnt_and_recommended() {
    let folder = Folder::new();
    fs::write(folder.path("pairs"), interactions()).unwrap();
    let train = "--data pairs --format interactions --epochs 2 --checkpoint m";
    for tables in [
        "--compression 1",
        "--compression 1/2 --inner-dim 4 --bits 8",
        "--compression 1/2 --inner-dim 20 --hash scma",
    ] {
        let printed = folder.succeeds(&format!("{train} {tables}"));
        assert!(printed.contains("interactions, pairs"), "{printed}");
        let auc = |printed: &str| {
            let line = printed
                .lines()
                .find(|line| line.contains("AUC ") && line.contains("test"));
            let (_, auc) = line.unwrap().split_once("AUC ").unwrap();
            auc[..6].parse::<f64>().unwrap()
        };
        assert!(auc(&printed) > 0.0);
        let evaluated =
            folder.succeeds("evaluate --data pairs --format interactions --checkpoint m");
        assert!(evaluated.contains("popularity"), "{evaluated}");
        // Without --data: items have no titles.
        let printed = folder.succeeds("recommend --user 70 --checkpoint m");
        let own = interactions().lines().nth(7).unwrap().to_owned();
        for item in own.split(' ').skip(1) {
            assert!(!printed.contains(item), "{printed}");
        }
        assert!(
            printed.contains("movie ") || printed.contains("item "),
            "{printed}"
        );
    }
    fs::write(folder.path("pairs"), interactions() + "9999 500\n").unwrap();
    let (_, said) = folder.fails("evaluate --data pairs --format interactions --checkpoint m");
    assert!(said.contains("not the interactions"), "{said}");
    let (_, said) = folder.fails("--format interactions");
    assert!(said.contains("--data"), "{said}");
    let (_, said) = folder.fails(&format!("{train} --inner-dim 0"));
    assert!(said.contains("inner-dim"), "{said}");
}

#[test]
fn extreme_arguments_are_errors_at_worst() {
    let folder = Folder::new();
    folder.plain_movielens();
    folder.succeeds("generate one --lines 1");
    folder.succeeds(&format!("{TRAIN} --batch-size {}", usize::MAX));
    for (arguments, said) in [
        ("generate none --lines 0", "invalid value '0'"),
        ("--data ml --compression 1e-300 --checkpoint m", "too few for hashed tables"),
        ("--data ml --embedding-dim 65536 --checkpoint m", "65536"),
        ("--data ml --hash balanced:18446744073709551615 --checkpoint m", "balanced:"),
        ("--data one --format criteo --checkpoint m", "1 examples are too few to split"),
        ("--data one --format criteo --rows-per-field 4294967295 --embedding-dim 65535 --compression 1 --checkpoint m", ""),
        ("recommend --user -9223372036854775808 --checkpoint ml", "cannot open the checkpoint"),
    ] {
        let (_, error) = folder.fails(arguments);
        assert!(error.contains(said), "{arguments}: {error}");
    }
}
