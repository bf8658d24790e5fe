//! A TCP connection from every rank to rank 0: where ranks meet, exchange small messages, and notice who is gone.
//!
//! ```text
//! rank 1 ──┐           hello, welcome     once
//! rank 2 ──┼── rank 0  messages           gather and broadcast, in the same order on all ranks
//! rank 3 ──┘           heartbeats         every second or more often: how many collectives the rank has entered
//!                      failure, leaving   at the end
//! ```
//!
//! Each process has a thread that watches. A rank is lost if its connection closes before it says that it is leaving, if
//! nothing is heard from it for the time limit, or if it has not entered, for as long, a collective that others have entered.
//! Rank 0 sees that of every rank and tells the others which rank it was. A process that has failed is ended by its watch if it
//! does not end by itself.

use super::world::{World, PORT};
use crate::error::{bail, error};
use candle_core::{Error, Result};
use serde::{Deserialize, Serialize};
use std::io::{self, ErrorKind, Read, Write};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr, TcpListener, TcpStream, ToSocketAddrs};
use std::sync::mpsc::{channel, Receiver, RecvTimeoutError, Sender};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// What both sides of a connection must say first.
const PROTOCOL: &str = "candle-hashed-embedding-bag ranks 1";
/// The most bytes of a frame.
const FRAME: usize = 1 << 20;
/// How long a connection may take to say who it is, so that a stranger's keeps nobody waiting for long.
const HELLO: Duration = Duration::from_secs(5);
/// Between two attempts to reach rank 0, or to find somebody who has reached it.
const POLL: Duration = Duration::from_millis(20);
/// A process that has failed may take so long to end by itself.
const GRACE: Duration = Duration::from_secs(10);

/// What a connection carries.
#[derive(Debug)]
enum Frame {
    /// How many collectives the sender has entered.
    Heartbeat(u64),
    /// A part of a message.
    Part(Vec<u8>),
    /// The last part of a message.
    Message(Vec<u8>),
    /// Why everything must end.
    Failure(String),
    /// The sender is done.
    Leaving,
}

impl Frame {
    fn write(&self, to: &mut impl Write) -> io::Result<()> {
        let count;
        let (kind, payload): (u8, &[u8]) = match self {
            Self::Heartbeat(entered) => {
                count = entered.to_le_bytes();
                (0, &count)
            }
            Self::Part(bytes) => (1, bytes),
            Self::Message(bytes) => (2, bytes),
            Self::Failure(text) => (3, text.as_bytes()),
            Self::Leaving => (4, &[]),
        };
        let mut frame = vec![kind];
        frame.extend((payload.len() as u32).to_le_bytes());
        frame.extend(payload);
        to.write_all(&frame)
    }

    fn read(from: &mut impl Read) -> io::Result<Self> {
        let mut head = [0; 5];
        from.read_exact(&mut head)?;
        let [kind, len @ ..] = head;
        let len = u32::from_le_bytes(len) as usize;
        let invalid = |what: &str| Err(io::Error::new(ErrorKind::InvalidData, what));
        if len > FRAME {
            return invalid("a frame is too long");
        }
        let mut payload = vec![0; len];
        from.read_exact(&mut payload)?;
        Ok(match kind {
            0 => match payload.try_into() {
                Ok(entered) => Self::Heartbeat(u64::from_le_bytes(entered)),
                Err(_) => return invalid("a heartbeat is no number"),
            },
            1 => Self::Part(payload),
            2 => Self::Message(payload),
            3 => Self::Failure(String::from_utf8_lossy(&payload).into_owned()),
            4 => Self::Leaving,
            _ => return invalid("a frame is of no known kind"),
        })
    }
}

/// The first message of a rank to rank 0, which answers by an empty message or a failure.
#[derive(Debug, PartialEq, Serialize, Deserialize)]
struct Hello {
    protocol: String,
    version: String,
    rank: usize,
    size: usize,
}

/// Something besides the connections that may fail, and that may keep the process waiting.
pub(super) trait Engine: Send {
    /// Why it has failed, if it has.
    fn failure(&mut self, limit: Duration) -> Option<String>;

    /// Ends whatever waits for it.
    fn abort(&mut self);
}

/// All connections of this process.
pub(super) struct Channel {
    rank: usize,
    shared: Arc<Shared>,
    /// Of `shared.peers`, in order.
    inboxes: Vec<Receiver<Vec<u8>>>,
    threads: Vec<JoinHandle<()>>,
}

/// What the threads of a process share.
struct Shared {
    rank: usize,
    limit: Duration,
    /// All others, by rank, at rank 0; elsewhere rank 0.
    peers: Vec<Peer>,
    state: Mutex<State>,
    changed: Condvar,
    engine: Mutex<Option<Box<dyn Engine>>>,
}

#[derive(Default)]
struct State {
    /// The collectives that this process has entered.
    entered: u64,
    failure: Option<String>,
    /// Whether the channel is being dropped.
    ended: bool,
}

struct Peer {
    rank: usize,
    address: SocketAddr,
    writer: Mutex<TcpStream>,
    heard: Mutex<Heard>,
}

struct Heard {
    at: Instant,
    entered: u64,
    is_leaving: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Channel {
    /// Waits until all ranks of `world` have met. `limit` is for that, and for every silence after it.
    pub fn meet(world: &World, limit: Duration) -> Result<Self> {
        let deadline = Instant::now() + limit;
        let peers = match world.rank {
            0 => receive_all(world, limit, deadline)?,
            _ => vec![(0, reach_rank_0(world, limit, deadline)?)],
        };
        let fail = |e: io::Error| error(format_args!("a connection between ranks: {e}"));
        Self::over(world.rank, peers, limit).map_err(fail)
    }

    fn over(rank: usize, streams: Vec<(usize, TcpStream)>, limit: Duration) -> io::Result<Self> {
        let (mut peers, mut readers) = (vec![], vec![]);
        for (rank, stream) in streams {
            stream.set_read_timeout(None)?;
            stream.set_write_timeout(Some(limit))?;
            readers.push(stream.try_clone()?);
            peers.push(Peer {
                rank,
                address: stream.peer_addr()?,
                writer: Mutex::new(stream),
                heard: Mutex::new(Heard {
                    at: Instant::now(),
                    entered: 0,
                    is_leaving: false,
                }),
            });
        }
        let shared = Arc::new(Shared {
            rank,
            limit,
            peers,
            state: Mutex::default(),
            changed: Condvar::new(),
            engine: Mutex::new(None),
        });
        let (mut inboxes, mut threads) = (vec![], vec![]);
        for (i, stream) in readers.into_iter().enumerate() {
            let (inbox, messages) = channel();
            inboxes.push(messages);
            let shared = shared.clone();
            threads.push(spawn("ranks-read", move || shared.read(i, stream, &inbox))?);
        }
        let watching = shared.clone();
        threads.push(spawn("ranks-watch", move || watching.watch())?);
        Ok(Self {
            rank,
            shared,
            inboxes,
            threads,
        })
    }

    /// Has `engine` watched too.
    #[cfg(any(test, feature = "nccl"))]
    pub fn watch(&self, engine: impl Engine + 'static) {
        *lock(&self.shared.engine) = Some(Box::new(engine));
    }

    /// # Errors
    /// Why everything must end, if it must.
    pub fn check(&self) -> Result<()> {
        match &lock(&self.shared.state).failure {
            Some(failure) => Err(error(failure)),
            None => Ok(()),
        }
    }

    /// To be called at the start of each operation in which all ranks take part.
    pub fn enter(&self) -> Result<()> {
        lock(&self.shared.state).entered += 1;
        self.check()
    }

    /// The messages of all ranks, by rank, at rank 0; elsewhere `None`.
    pub fn gather(&self, message: &[u8]) -> Result<Option<Vec<Vec<u8>>>> {
        self.enter()?;
        if self.rank > 0 {
            self.send(&self.shared.peers[0], message)?;
            return Ok(None);
        }
        let mut all = vec![message.to_vec()];
        for inbox in &self.inboxes {
            all.push(self.receive(inbox)?);
        }
        Ok(Some(all))
    }

    /// The message of rank 0, everywhere.
    pub fn broadcast(&self, message: Option<Vec<u8>>) -> Result<Vec<u8>> {
        let entered = self.enter();
        if self.rank > 0 {
            // What rank 0 has said before it ended is more than that it has ended.
            return self.receive(&self.inboxes[0]);
        }
        entered?;
        let Some(message) = message else {
            bail!("rank 0 has nothing to broadcast");
        };
        for peer in &self.shared.peers {
            self.send(peer, &message)?;
        }
        Ok(message)
    }

    /// Waits until all ranks have called it.
    pub fn barrier(&self) -> Result<()> {
        self.gather(&[])?;
        self.broadcast((self.rank == 0).then(Vec::new))?;
        Ok(())
    }

    /// Tells the others that this rank is done, and waits until they are. All ranks must call it.
    pub fn leave(mut self) -> Result<()> {
        self.barrier()?;
        for peer in &self.shared.peers {
            let writer = lock(&peer.writer);
            // Whoever is gone by now is done, too.
            let _ = Frame::Leaving.write(&mut &*writer);
            let _ = writer.shutdown(std::net::Shutdown::Write);
        }
        // Closing a connection in which something is still unread would destroy what is on its way to the other side.
        let watch = self.threads.pop();
        for reader in self.threads.drain(..) {
            let _ = reader.join();
        }
        self.threads.extend(watch);
        Ok(())
    }

    fn send(&self, peer: &Peer, message: &[u8]) -> Result<()> {
        let mut parts = message.chunks(FRAME);
        let last = parts.next_back().unwrap_or_default();
        let frames = parts.map(|part| Frame::Part(part.to_vec()));
        for frame in frames.chain([Frame::Message(last.to_vec())]) {
            if let Err(e) = frame.write(&mut *lock(&peer.writer)) {
                self.shared
                    .fail(|| format!("{peer} cannot be reached: {e}"));
                self.check()?;
            }
        }
        Ok(())
    }

    fn receive(&self, inbox: &Receiver<Vec<u8>>) -> Result<Vec<u8>> {
        loop {
            match inbox.recv_timeout(POLL) {
                Ok(message) => return Ok(message),
                Err(RecvTimeoutError::Timeout) => self.check()?,
                Err(RecvTimeoutError::Disconnected) => {
                    self.check()?;
                    bail!("a rank has left while another waits for a message of it");
                }
            }
        }
    }
}

impl Drop for Channel {
    fn drop(&mut self) {
        lock(&self.shared.state).ended = true;
        self.shared.changed.notify_all();
        // First the watch, which may have a failure to tell.
        if let Some(watch) = self.threads.pop() {
            let _ = watch.join();
        }
        for peer in &self.shared.peers {
            let _ = lock(&peer.writer).shutdown(std::net::Shutdown::Both);
        }
        for reader in self.threads.drain(..) {
            let _ = reader.join();
        }
    }
}

impl Shared {
    /// The first failure stays. One that is found while the channel is dropped is none.
    fn fail(&self, failure: impl FnOnce() -> String) {
        let mut state = lock(&self.state);
        if !state.ended && state.failure.is_none() {
            state.failure = Some(failure());
            self.changed.notify_all();
        }
    }

    /// Reads all that peer `i` sends, until the connection closes.
    fn read(&self, i: usize, mut stream: TcpStream, inbox: &Sender<Vec<u8>>) {
        let peer = &self.peers[i];
        let mut message = vec![];
        loop {
            let frame = Frame::read(&mut stream);
            let mut heard = lock(&peer.heard);
            heard.at = Instant::now();
            match frame {
                Ok(Frame::Heartbeat(entered)) => heard.entered = entered,
                Ok(Frame::Part(part)) => message.extend(part),
                Ok(Frame::Message(part)) => {
                    message.extend(part);
                    // Nobody waits for a message once the channel is dropped.
                    let _ = inbox.send(std::mem::take(&mut message));
                }
                Ok(Frame::Failure(failure)) => self.fail(|| failure),
                Ok(Frame::Leaving) => heard.is_leaving = true,
                Err(_) if heard.is_leaving => return,
                Err(e) => {
                    self.fail(|| match e.kind() {
                        ErrorKind::UnexpectedEof | ErrorKind::ConnectionReset => {
                            format!("{peer} has ended before the others")
                        }
                        _ => format!("the connection to {peer} is broken: {e}"),
                    });
                    return;
                }
            }
        }
    }

    /// Sends heartbeats and looks for failures until the channel is dropped.
    fn watch(self: &Arc<Self>) {
        let interval = (self.limit / 10).min(Duration::from_secs(1));
        let mut behind = vec![(0, Instant::now()); self.peers.len() + 1];
        let mut state = lock(&self.state);
        while state.failure.is_none() && !state.ended {
            (state, _) = self
                .changed
                .wait_timeout(state, interval)
                .unwrap_or_else(PoisonError::into_inner);
            if state.failure.is_some() || state.ended {
                break;
            }
            let entered = state.entered;
            drop(state);
            for peer in &self.peers {
                // The reader of the connection notices if it is closed.
                let _ = Frame::Heartbeat(entered).write(&mut *lock(&peer.writer));
            }
            let failure = self
                .silent()
                .or_else(|| self.hanging(entered, &mut behind))
                .or_else(|| lock(&self.engine).as_mut()?.failure(self.limit));
            if let Some(failure) = failure {
                self.fail(|| failure);
            }
            state = lock(&self.state);
        }
        let Some(failure) = state.failure.clone() else {
            return;
        };
        drop(state);
        if self.rank == 0 {
            for peer in &self.peers {
                let _ = Frame::Failure(failure.clone()).write(&mut *lock(&peer.writer));
            }
        }
        // On a thread of its own, in case that hangs, too.
        let shared = self.clone();
        let aborting = spawn("ranks-abort", move || {
            if let Some(engine) = lock(&shared.engine).as_mut() {
                engine.abort();
            }
        });
        // Without a thread, the process ends when its time is over.
        drop(aborting);
        let (state, _) = self
            .changed
            .wait_timeout_while(lock(&self.state), GRACE, |state| !state.ended)
            .unwrap_or_else(PoisonError::into_inner);
        if !state.ended {
            eprintln!("Error: {}", error(failure));
            std::process::exit(1);
        }
    }

    /// A peer that sends not even heartbeats.
    fn silent(&self) -> Option<String> {
        self.peers.iter().find_map(|peer| {
            let heard = lock(&peer.heard);
            (heard.at.elapsed() > self.limit && !heard.is_leaving)
                .then(|| format!("{peer} has not been heard from for {:?}", self.limit))
        })
    }

    /// A rank that has not entered, for the time limit, what another has entered. Only rank 0 knows of all.
    ///
    /// `behind` has for each rank the collectives that it had entered, and since when that has been less than others had.
    fn hanging(&self, entered: u64, behind: &mut [(u64, Instant)]) -> Option<String> {
        if self.rank > 0 {
            return None;
        }
        let of_peers = self.peers.iter().map(|peer| {
            let heard = lock(&peer.heard);
            (heard.entered, heard.is_leaving)
        });
        let ranks: Vec<_> = std::iter::once((entered, false)).chain(of_peers).collect();
        let most = ranks.iter().map(|(entered, _)| *entered).max()?;
        for ((entered, is_leaving), behind) in ranks.iter().zip(&mut *behind) {
            if *entered == most || *is_leaving || *entered != behind.0 {
                *behind = (*entered, Instant::now());
            }
        }
        // The others wait for the one that is furthest behind, even if it has been so for a shorter time.
        let furthest = ranks
            .iter()
            .enumerate()
            .filter(|(_, (_, is_leaving))| !is_leaving);
        let (rank, _) = furthest.min_by_key(|(_, (entered, _))| *entered)?;
        if behind[rank].1.elapsed() <= self.limit {
            return None;
        }
        let name = match rank {
            0 => "rank 0".to_string(),
            _ => self.peers[rank - 1].to_string(),
        };
        let limit = self.limit;
        Some(format!(
            "{name} hangs: for {limit:?}, others have been waiting for it"
        ))
    }
}

impl std::fmt::Display for Peer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "rank {} ({})", self.rank, self.address.ip())
    }
}

fn spawn(name: &str, work: impl FnOnce() + Send + 'static) -> io::Result<JoinHandle<()>> {
    thread::Builder::new().name(name.to_string()).spawn(work)
}

/// At rank 0: the connections of all other ranks, by rank.
fn receive_all(
    world: &World,
    limit: Duration,
    deadline: Instant,
) -> Result<Vec<(usize, TcpStream)>> {
    let listener = listen(world)?;
    let mut streams: Vec<Option<TcpStream>> = (1..world.size).map(|_| None).collect();
    while streams.iter().any(Option::is_none) {
        let stream = match listener.accept() {
            Ok((stream, _)) => stream,
            Err(_) if Instant::now() < deadline => {
                thread::sleep(POLL);
                continue;
            }
            Err(_) => {
                let missing = streams
                    .iter()
                    .zip(1..)
                    .filter(|(stream, _)| stream.is_none());
                let missing: Vec<_> = missing.map(|(_, rank): (_, usize)| rank).collect();
                bail!(
                    "of {} ranks, {missing:?} have not reached rank 0 at {}:{} within {limit:?}",
                    world.size,
                    world.host,
                    world.port
                );
            }
        };
        // A stranger, such as a scanner of ports, says something else or nothing.
        let Ok((mut stream, hello)) = read_hello(stream) else {
            continue;
        };
        match admit(world, &hello, &streams) {
            Ok(i) => streams[i] = Some(stream),
            Err(refusal) => {
                let failure = Frame::Failure(refusal.clone());
                for stream in streams.iter_mut().flatten().chain([&mut stream]) {
                    let _ = failure.write(stream);
                }
                return Err(error(refusal));
            }
        }
    }
    let mut all = vec![];
    for (rank, stream) in (1..).zip(streams.into_iter().flatten()) {
        if let Err(e) = Frame::Message(vec![]).write(&mut &stream) {
            bail!("rank {rank} has ended before all ranks had met: {e}");
        }
        all.push((rank, stream));
    }
    Ok(all)
}

fn listen(world: &World) -> Result<TcpListener> {
    let World { host, port, .. } = world;
    let addresses = resolve(world)?;
    // A host may know itself by an address at which others do not reach it, so all are listened at unless all ranks are local.
    let is_local = addresses.iter().all(|address| address.ip().is_loopback());
    let any: IpAddr = match addresses.iter().any(SocketAddr::is_ipv4) {
        true => Ipv4Addr::UNSPECIFIED.into(),
        false => Ipv6Addr::UNSPECIFIED.into(),
    };
    let bound = match is_local {
        true => TcpListener::bind(&addresses[..]),
        false => TcpListener::bind((any, *port)),
    };
    match bound {
        Ok(listener) => {
            listener.set_nonblocking(true)?;
            Ok(listener)
        }
        Err(e) if e.kind() == ErrorKind::AddrInUse => {
            bail!("port {port} is in use: set {PORT} to one that is free on {host}, for all ranks")
        }
        Err(e) => bail!("rank 0 cannot listen at {host}:{port}: {e}"),
    }
}

fn resolve(world: &World) -> Result<Vec<SocketAddr>> {
    let World { host, port, .. } = world;
    match (host.as_str(), *port).to_socket_addrs() {
        Ok(addresses) => Ok(addresses.collect()),
        Err(e) => bail!("MASTER_ADDR {host:?} cannot be resolved: {e}"),
    }
}

fn read_hello(stream: TcpStream) -> Result<(TcpStream, Hello)> {
    stream.set_nonblocking(false)?;
    stream.set_nodelay(true)?;
    stream.set_read_timeout(Some(HELLO))?;
    match Frame::read(&mut &stream)? {
        Frame::Message(hello) => {
            let hello: Hello = serde_json::from_slice(&hello).map_err(Error::wrap)?;
            if hello.protocol != PROTOCOL {
                bail!("another protocol: {}", hello.protocol);
            }
            Ok((stream, hello))
        }
        frame => bail!("no hello: {frame:?}"),
    }
}

/// The place of a rank among the others, or why it has none.
fn admit(
    world: &World,
    hello: &Hello,
    streams: &[Option<TcpStream>],
) -> std::result::Result<usize, String> {
    let Hello { rank, size, .. } = hello;
    let ours = env!("CARGO_PKG_VERSION");
    if hello.version != ours {
        let theirs = &hello.version;
        return Err(format!(
            "rank {rank} has version {theirs}, rank 0 has {ours}"
        ));
    }
    if *size != world.size {
        return Err(format!(
            "WORLD_SIZE is {size} at rank {rank} and {} at rank 0",
            world.size
        ));
    }
    match streams.get(rank.wrapping_sub(1)) {
        Some(None) => Ok(rank - 1),
        Some(Some(_)) => Err(format!("two processes have RANK {rank}")),
        None => Err(format!(
            "two processes have RANK 0, or RANK {rank} is too high"
        )),
    }
}

/// At any other rank: the connection to rank 0.
fn reach_rank_0(world: &World, limit: Duration, deadline: Instant) -> Result<TcpStream> {
    let World {
        rank,
        size,
        host,
        port,
        ..
    } = world;
    let hello = Hello {
        protocol: PROTOCOL.to_string(),
        version: env!("CARGO_PKG_VERSION").to_string(),
        rank: *rank,
        size: *size,
    };
    let hello = serde_json::to_vec(&hello).map_err(Error::wrap)?;
    let fail = |e: &dyn std::fmt::Display| {
        error(format_args!(
            "rank {rank} cannot reach rank 0 at {host}:{port} within {limit:?}: {e}"
        ))
    };
    loop {
        match connect(world) {
            Ok(stream) => {
                stream.set_nodelay(true)?;
                // Rank 0 gives up at its own deadline, and then says so.
                let left = deadline.saturating_duration_since(Instant::now());
                stream.set_read_timeout(Some(left + HELLO))?;
                let answer = Frame::Message(hello.clone())
                    .write(&mut &stream)
                    .and_then(|()| Frame::read(&mut &stream));
                return match answer {
                    Ok(Frame::Message(_)) => Ok(stream),
                    Ok(Frame::Failure(refusal)) => Err(error(refusal)),
                    Ok(_) => Err(fail(&"something else listens there")),
                    Err(e) => Err(fail(&e)),
                };
            }
            Err(_) if Instant::now() < deadline => thread::sleep(POLL),
            Err(e) => return Err(fail(&e)),
        }
    }
}

fn connect(world: &World) -> io::Result<TcpStream> {
    let mut failure = io::Error::other("its name has no address");
    for address in (world.host.as_str(), world.port).to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, HELLO) {
            // While nobody listens at a port that the system also gives to connections, one may reach itself.
            Ok(stream) if stream.local_addr()? == stream.peer_addr()? => {
                failure = ErrorKind::ConnectionRefused.into();
            }
            Ok(stream) => return Ok(stream),
            Err(e) => failure = e,
        }
    }
    Err(failure)
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// A port at which nobody listens.
    pub fn free_port() -> u16 {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        listener.local_addr().unwrap().port()
    }

    fn world(rank: usize, size: usize, port: u16) -> World {
        World {
            rank,
            size,
            local_rank: rank,
            host: "127.0.0.1".to_owned(),
            port,
        }
    }

    /// Rank 0 of two, and what is said to it on a connection.
    fn rank_0_of_two(limit: Duration, say: impl FnOnce(u16) + Send) -> Result<Channel> {
        let port = free_port();
        thread::scope(|scope| {
            scope.spawn(move || say(port));
            Channel::meet(&world(0, 2, port), limit)
        })
    }

    fn dial(port: u16) -> TcpStream {
        loop {
            if let Ok(stream) = TcpStream::connect(("127.0.0.1", port)) {
                return stream;
            }
            thread::sleep(POLL);
        }
    }

    fn hello(version: &str, rank: usize, size: usize) -> Frame {
        let hello = Hello {
            protocol: PROTOCOL.to_owned(),
            version: version.to_owned(),
            rank,
            size,
        };
        Frame::Message(serde_json::to_vec(&hello).unwrap())
    }

    const VERSION: &str = env!("CARGO_PKG_VERSION");

    #[test]
    fn frames_come_back() -> io::Result<()> {
        for frame in [
            Frame::Heartbeat(1 << 40),
            Frame::Part(vec![1, 2]),
            Frame::Message(vec![]),
            Frame::Failure("ä".to_owned()),
            Frame::Leaving,
        ] {
            let mut bytes = vec![];
            frame.write(&mut bytes)?;
            let read = Frame::read(&mut &bytes[..])?;
            assert_eq!(format!("{read:?}"), format!("{frame:?}"));
            assert!(Frame::read(&mut &bytes[..bytes.len() - 1]).is_err());
        }
        for wrong in [
            &[9u8, 0, 0, 0, 0][..],
            &[2, 1, 0, 16, 0],
            &[0, 1, 0, 0, 0, 7],
        ] {
            assert!(Frame::read(&mut &wrong[..]).is_err(), "{wrong:?}");
        }
        Ok(())
    }

    #[test]
    fn a_port_in_use_is_named() {
        let taken = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = taken.local_addr().unwrap().port();
        let met = Channel::meet(&world(0, 2, port), Duration::from_secs(5));
        let said = met.err().unwrap().to_string();
        let expected = format!("port {port} is in use: set HEB_PORT to one that is free");
        assert!(said.contains(&expected), "{said}");
    }

    #[test]
    fn ranks_that_do_not_come_are_named() {
        let limit = Duration::from_millis(300);
        let met = Channel::meet(&world(0, 3, free_port()), limit);
        let said = met.err().unwrap().to_string();
        assert!(
            said.contains("of 3 ranks, [1, 2] have not reached rank 0"),
            "{said}"
        );

        let port = free_port();
        let met = Channel::meet(&world(1, 2, port), limit);
        let said = met.err().unwrap().to_string();
        let expected = format!("rank 1 cannot reach rank 0 at 127.0.0.1:{port} within 300ms");
        assert!(said.contains(&expected), "{said}");
    }

    #[test]
    fn other_versions_and_worlds_are_refused_on_both_sides() {
        for (version, rank, size, said) in [
            (
                "0.0.7",
                1,
                2,
                format!("rank 1 has version 0.0.7, rank 0 has {VERSION}"),
            ),
            (
                VERSION,
                1,
                4,
                "WORLD_SIZE is 4 at rank 1 and 2 at rank 0".to_owned(),
            ),
            (VERSION, 0, 2, "two processes have RANK 0".to_owned()),
            (VERSION, 2, 2, "RANK 2 is too high".to_owned()),
        ] {
            let met = rank_0_of_two(Duration::from_secs(20), |port| {
                let mut stream = dial(port);
                hello(version, rank, size).write(&mut stream).unwrap();
                match Frame::read(&mut stream) {
                    Ok(Frame::Failure(refusal)) => assert!(refusal.contains(&said), "{refusal}"),
                    other => panic!("{other:?}"),
                }
            });
            let error = met.err().unwrap().to_string();
            assert!(error.contains(&said), "{error}");
        }
    }

    #[test]
    fn strangers_keep_no_rank_out() {
        let met = rank_0_of_two(Duration::from_secs(20), |port| {
            drop(dial(port));
            dial(port).write_all(b"GET / HTTP/1.1\r\n\r\n").unwrap();
            let mut rank = dial(port);
            hello(VERSION, 1, 2).write(&mut rank).unwrap();
            assert!(matches!(Frame::read(&mut rank), Ok(Frame::Message(_))));
        });
        assert!(met.is_ok());
    }

    #[test]
    fn a_rank_that_falls_silent_is_lost() {
        let limit = Duration::from_millis(500);
        let (done, wait) = channel::<()>();
        let met = rank_0_of_two(limit, move |port| {
            let mut rank = dial(port);
            hello(VERSION, 1, 2).write(&mut rank).unwrap();
            thread::spawn(move || {
                let _ = wait.recv();
                drop(rank);
            });
        });
        let error = met.unwrap().gather(&[]).unwrap_err().to_string();
        assert!(
            error.contains("rank 1 (127.0.0.1) has not been heard from for 500ms"),
            "{error}"
        );
        drop(done);
    }

    #[test]
    fn an_engine_that_fails_is_aborted_and_ends_all_ranks() {
        struct Failing(std::sync::mpsc::Sender<()>);

        impl Engine for Failing {
            fn failure(&mut self, _: Duration) -> Option<String> {
                Some("the engine failed".to_owned())
            }

            fn abort(&mut self) {
                self.0.send(()).unwrap();
            }
        }

        let (limit, port) = (Duration::from_millis(500), free_port());
        thread::scope(|scope| {
            for rank in 0..2 {
                scope.spawn(move || {
                    let channel = Channel::meet(&world(rank, 2, port), limit).unwrap();
                    let (aborted, wait) = std::sync::mpsc::channel();
                    if rank == 0 {
                        channel.watch(Failing(aborted));
                    }
                    while channel.check().is_ok() {
                        thread::sleep(POLL);
                    }
                    let said = channel.barrier().unwrap_err().to_string();
                    assert!(said.contains("the engine failed"), "{said}");
                    if rank == 0 {
                        wait.recv().unwrap();
                    }
                });
            }
        });
    }

    #[test]
    fn a_rank_that_hangs_is_lost_to_all() {
        let (limit, port) = (Duration::from_millis(500), free_port());
        for hanging in 0..3 {
            let said: Vec<_> = thread::scope(|scope| {
                let ranks = (0..3).map(|rank| {
                    scope.spawn(move || {
                        let channel = Channel::meet(&world(rank, 3, port), limit).unwrap();
                        channel.barrier().unwrap();
                        if rank == hanging {
                            // Its threads send heartbeats, but it takes part in nothing.
                            while channel.check().is_ok() {
                                thread::sleep(POLL);
                            }
                        }
                        channel.barrier().unwrap_err().to_string()
                    })
                });
                let ranks: Vec<_> = ranks.collect();
                ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
            });
            let expected = format!("rank {hanging}");
            for said in said {
                assert!(
                    said.contains(&expected) && said.contains(" hangs: for 500ms"),
                    "{said}"
                );
            }
        }
    }
}
