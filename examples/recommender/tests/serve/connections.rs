//! Clients that are slow, silent or gone, and the end of the server.

use std::net::TcpListener;
use std::process::Stdio;
use std::thread;
use std::time::{Duration, Instant};

use crate::support::*;

#[test]
fn a_body_that_is_announced_too_long_is_not_waited_for() {
    let server = Server::start(trained(), &["--max-body-bytes", "8192"]);
    let mut raw = Raw::open(&server);
    let start = Instant::now();
    raw.send(&score_head(8193));
    let (status, body) = raw.answer();
    assert_eq!(status, 413, "{body}");
    assert!(body.contains("longer than 8192 bytes"), "{body}");
    assert!(raw.is_ended());
    assert!(start.elapsed() < Duration::from_secs(20));
}

#[test]
fn half_a_request_keeps_no_connection() {
    let flags = ["--read-timeout-seconds", "1", "--max-connections", "3"];
    let server = Server::start(trained(), &flags);
    let (mut head, mut body) = (Raw::open(&server), Raw::open(&server));
    head.send("POST /score HTTP/1.1\r\nhost:");
    body.send(&format!("{}{{", score_head(10)));
    // With both there is room for one more, and then for none; all of them are answered in the end.
    let clients: Vec<_> = (0..4)
        .map(|seed| {
            let client = server.client();
            thread::spawn(move || client.score(&pairs(seed)).len())
        })
        .collect();
    for client in clients {
        assert_eq!(client.join().unwrap(), 64);
    }
    let (status, said) = body.answer();
    assert_eq!(status, 408, "{said}");
    assert!(said.contains("did not arrive within 1 s"), "{said}");
    assert!(body.is_ended() && head.is_ended());
}

/// Neither does a time limit hit a client that asks again, nor one whose answer takes longer.
#[test]
fn connections_are_used_again() {
    let flags = ["--read-timeout-seconds", "1", "--batch-deadline-ms", "1500"];
    let server = Server::start(trained(), &flags);
    let mut raw = Raw::open(&server);
    let asked = score_body(&pairs(1)).to_string();
    for _ in 0..2 {
        raw.send(&score_head(asked.len()));
        thread::sleep(Duration::from_millis(600));
        raw.send(&asked);
        let (status, body) = raw.answer();
        assert_eq!(status, 200, "{body}");
        thread::sleep(Duration::from_millis(600));
    }
    assert!(raw.is_ended(), "an idle connection ends");
}

#[test]
fn it_listens_on_a_name() {
    let server = Server::start_at("localhost:0", trained(), &[]);
    assert_eq!(server.client().json("/healthz")["status"], "ok");
}

/// Nobody need read what it says, on either output.
#[test]
fn closed_outputs_do_not_end_it() {
    let port = TcpListener::bind("127.0.0.1:0")
        .unwrap()
        .local_addr()
        .unwrap()
        .port();
    let mut process = command(&format!("127.0.0.1:{port}"), trained(), &[])
        .env("RUST_LOG", "debug")
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    drop((process.stdout.take(), process.stderr.take()));
    let server = Server {
        process,
        address: format!("http://127.0.0.1:{port}"),
    };
    let (client, start) = (server.client(), Instant::now());
    while client
        .agent
        .get(format!("{}/healthz", server.address))
        .call()
        .is_err()
    {
        assert!(start.elapsed() < PATIENCE, "it does not answer");
        thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(client.score(&pairs(1)).len(), 64);
}

#[cfg(unix)]
#[test]
fn sigterm_finishes_what_is_in_flight() {
    let mut server = Server::start(trained(), &["--batch-deadline-ms", "1000"]);
    let client = server.client();
    let waiting = thread::spawn({
        let client = server.client();
        move || client.score(&pairs(1)).len()
    });
    while client.metric("queued_rows") == 0.0 {
        assert!(!waiting.is_finished());
    }
    server.signal(rustix::process::Signal::TERM);
    assert_eq!(waiting.join().unwrap(), 64);
    assert!(server.ended().success());
    assert!(client
        .agent
        .get(format!("{}/healthz", client.address))
        .call()
        .is_err());
}

/// A client that never ends its request does not keep the server alive, and was promised nothing: that is no failure.
#[cfg(unix)]
#[test]
fn sigterm_does_not_wait_for_half_a_request() {
    let mut server = Server::start(trained(), &["--drain-seconds", "4"]);
    let (mut head, mut body) = (Raw::open(&server), Raw::open(&server));
    head.send("POST /score HTTP/1.1\r\nhost:");
    body.send(&format!("{}{{", score_head(10)));
    // Answered on another connection: the server has seen the first ones.
    server.client().get("/healthz");
    let start = Instant::now();
    server.signal(rustix::process::Signal::TERM);
    assert_eq!(server.ended().code(), Some(0));
    assert!(start.elapsed() < Duration::from_secs(4));
}

/// A request that is computed too long is one.
#[cfg(unix)]
#[test]
fn sigterm_does_not_wait_for_ever() {
    let flags = ["--drain-seconds", "0", "--batch-deadline-ms", "30000"];
    let mut server = Server::start(trained(), &flags);
    let client = server.client();
    let agent = client.agent.clone();
    let waiting = thread::spawn({
        let url = format!("{}/score", client.address);
        move || agent.post(url).send_json(score_body(&pairs(1))).is_err()
    });
    while client.metric("queued_rows") == 0.0 {
        assert!(!waiting.is_finished());
    }
    server.signal(rustix::process::Signal::TERM);
    assert_eq!(server.ended().code(), Some(1));
    assert!(waiting.join().unwrap());
}

/// A balancer that asks /readyz sends no more requests, and those that it has sent meanwhile are answered.
#[cfg(unix)]
#[test]
fn the_listener_stays_open_while_draining() {
    let mut server = Server::start(trained(), &["--drain-delay-seconds", "2"]);
    let client = server.client();
    assert_eq!(client.json("/readyz")["status"], "ready");
    server.signal(rustix::process::Signal::TERM);
    let start = Instant::now();
    let ready = || {
        let answer = client
            .agent
            .get(format!("{}/readyz", client.address))
            .call();
        answer.unwrap().status().as_u16()
    };
    while ready() == 200 {
        assert!(start.elapsed() < PATIENCE, "SIGTERM was not heard");
    }
    assert_eq!(ready(), 503);
    // A new connection.
    assert_eq!(server.client().score(&pairs(1)).len(), 64);
    assert_eq!(client.json("/healthz")["status"], "ok");
    assert!(server.ended().success());
    assert!(start.elapsed() >= Duration::from_millis(1900));
}
