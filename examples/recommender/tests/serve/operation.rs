//! What the server tells those who run it.

use std::io::{BufRead, BufReader, Read};
use std::process::Stdio;

use crate::support::*;

#[test]
fn it_does_not_start_on_what_it_cannot_serve() {
    let folder = tempfile::tempdir().unwrap();
    let missing = folder.path().join("model.safetensors");
    for (checkpoint, flags, said) in [
        (
            missing.as_path(),
            &["--max-body-bytes", "1"][..],
            "cannot open the checkpoint",
        ),
        (trained(), &["--data", "ml"], "leave out --data"),
        (
            trained(),
            &["--batch-rows", "10", "--queue-rows", "9"],
            "--batch-rows must lie in 1..=9",
        ),
    ] {
        let mut process = command("127.0.0.1:0", checkpoint, flags)
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        assert_eq!(ended(&mut process).code(), Some(1));
        let mut stderr = String::new();
        process.stderr.unwrap().read_to_string(&mut stderr).unwrap();
        assert!(stderr.contains(said), "{stderr}");
    }
}

#[test]
fn counters_exist_before_the_first_request() {
    let server = Server::start(trained(), &[]);
    let text = server.client().get("/metrics");
    for sample in [
        r#"http_requests_total{route="/recommend",status="200"} 0"#,
        r#"http_requests_total{route="/predict",status="200"} 0"#,
        r#"http_request_duration_seconds_count{route="/score"} 0"#,
        r#"reloads_total{outcome="replaced"} 0"#,
        r#"reloads_total{outcome="refused"} 0"#,
    ] {
        assert!(text.lines().any(|line| line == sample), "{sample}: {text}");
    }
}

#[cfg(target_os = "linux")]
#[test]
fn the_process_is_measured() {
    let server = Server::start(trained(), &[]);
    let client = server.client();
    let at_most = |name: &str, most: f64| {
        let value = client.metric(name);
        assert!(0.0 < value && value <= most, "{name} {value}");
    };
    let before = client.metric("process_cpu_seconds_total");
    for seed in 0..20 {
        client.score(&pairs(seed));
    }
    assert!(client.metric("process_cpu_seconds_total") >= before);
    at_most("process_resident_memory_bytes", 4e9);
    at_most("process_open_fds", client.metric("process_max_fds"));
    at_most("process_threads", 1000.0);
    let now = std::time::SystemTime::UNIX_EPOCH.elapsed().unwrap();
    let start = client.metric("process_start_time_seconds");
    assert!((start - now.as_secs_f64()).abs() < 120.0, "{start}");
}

#[test]
fn the_checkpoint_tells_what_it_is() {
    let server = Server::start(trained(), &[]);
    let health = server.client().json("/healthz");
    let about = &health["about"];
    assert_eq!(about["data"]["kind"], "generated ratings");
    assert_eq!(about["hyper_parameters"]["epochs"], 1);
    assert_eq!(about["hyper_parameters"]["seed"], 1);
    assert_eq!(about["version"], health["version"]);
    let auc = about["metrics"]["test"]["auc"].as_f64().unwrap();
    assert!(0.5 < auc && auc < 1.0);
    assert!(about["catalogue"].as_str().unwrap().len() == 16);

    // The same without serving it.
    let output = command("127.0.0.1:0", trained(), &["--inspect"])
        .output()
        .unwrap();
    assert!(output.status.success());
    let inspected: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(inspected, health);

    for program in [SERVE, RECOMMENDER] {
        let output = std::process::Command::new(program)
            .arg("--version")
            .output();
        let said = String::from_utf8(output.unwrap().stdout).unwrap();
        assert!(said.contains(health["version"].as_str().unwrap()), "{said}");
    }
}

#[test]
fn options_come_from_the_environment_too() {
    let mut process = std::process::Command::new(SERVE)
        .env("RECOMMENDER_CHECKPOINT", trained())
        .env("SERVE_LISTEN", "127.0.0.1:0")
        .env("SERVE_LOG_FORMAT", "json")
        .env("SERVE_THREADS", "1")
        .env("RUST_LOG", "info")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut line = String::new();
    let (stdout, stderr) = (
        process.stdout.take().unwrap(),
        process.stderr.take().unwrap(),
    );
    BufReader::new(stdout).read_line(&mut line).unwrap();
    assert!(line.starts_with("listening on http://127.0.0.1:"), "{line}");
    line.clear();
    BufReader::new(stderr).read_line(&mut line).unwrap();
    process.kill().unwrap();
    process.wait().unwrap();
    let event: serde_json::Value = serde_json::from_str(&line).unwrap();
    assert_eq!(
        (&event["level"], &event["message"]),
        (&"INFO".into(), &"listening".into())
    );

    let wrong = std::process::Command::new(SERVE)
        .env("SERVE_BATCH_ROWS", "many")
        .output()
        .unwrap();
    assert_eq!(wrong.status.code(), Some(2));
    let said = String::from_utf8(wrong.stderr).unwrap();
    assert!(
        said.contains("invalid value 'many' for '--batch-rows"),
        "{said}"
    );
}
