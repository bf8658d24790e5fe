//! Concurrent requests gathered into batches, behind a bounded queue.
//!
//! A batch is computed when it is full, or when its oldest request has waited until the deadline. The next batch gathers while as
//! many as allowed are being computed, so under load nobody waits for the deadline. Room in the queue is counted in rows and not in requests, since rows
//! take time and memory. A request keeps its room until it is answered.

use std::ops::Range;
use std::panic::{catch_unwind, AssertUnwindSafe};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc::error::TryRecvError;
use tokio::sync::{mpsc, oneshot, OwnedSemaphorePermit, Semaphore};
use tokio::time::{timeout_at, Instant};

use crate::metrics::{Batches, Metrics};
use crate::serving::Model;
use recommender::data::Batch;
use recommender::profiles::Profile;

#[derive(Clone, Copy)]
pub struct Limits {
    /// The most rows in a batch.
    pub batch_rows: usize,
    /// The longest time that a request waits for others.
    pub deadline: Duration,
    /// The most rows that wait or are being computed.
    pub queue_rows: usize,
    /// The most batches that are computed at a time.
    pub batches: usize,
}

/// What a request asks of a model. All of its rows must be valid for that model.
pub enum Work {
    /// So many examples, to be scored.
    Examples { batch: Batch, count: usize },
    /// The movies of some rows, to be scored for one user.
    Candidates { user: Profile, movies: Range<usize> },
    /// Bags of rows of a table, to be pooled; `offsets` are their starts.
    Bags {
        table: String,
        indices: Vec<i64>,
        offsets: Vec<i64>,
    },
}

/// The reason why there is no answer.
#[derive(Debug)]
pub enum Failure {
    /// The queue has no room.
    Full,
    /// The model failed.
    Model(String),
}

pub type Answer = Result<Vec<f32>, Failure>;

pub struct Batcher {
    limits: Limits,
    queue: mpsc::UnboundedSender<Job>,
    room: Arc<Semaphore>,
}

struct Job {
    model: Arc<Model>,
    work: Work,
    accepted: Instant,
    caller: Caller,
}

/// A caller that waits for a part of a batch's answers, and the room that it holds in the queue meanwhile.
struct Caller {
    reply: oneshot::Sender<Answer>,
    room: OwnedSemaphorePermit,
}

impl Caller {
    fn answer(self, answer: Answer) {
        // Before the answer, so that a caller who asks again at once finds the room.
        drop(self.room);
        // A caller that has gone needs no answer.
        let _ = self.reply.send(answer);
    }
}

impl Batcher {
    pub fn start(limits: Limits, metrics: &Metrics) -> Self {
        let (queue, jobs) = mpsc::unbounded_channel();
        tokio::spawn(run(jobs, limits, metrics.batches.clone()));
        Self {
            limits,
            queue,
            room: Arc::new(Semaphore::new(limits.queue_rows)),
        }
    }

    /// The most rows of a request.
    pub fn max_rows(&self) -> usize {
        self.limits.batch_rows
    }

    /// Rows that wait or are being computed.
    pub fn queued_rows(&self) -> usize {
        self.limits.queue_rows - self.room.available_permits()
    }

    /// The answer of `model` to at most [`max_rows`](Self::max_rows) rows, computed together with other requests.
    pub async fn compute(&self, model: &Arc<Model>, work: Work) -> Answer {
        if work.rows() == 0 {
            return Ok(Vec::new());
        }
        let room = self.room.clone().try_acquire_many_owned(work.rows() as u32);
        let room = room.map_err(|_| Failure::Full)?;
        let (reply, answer) = oneshot::channel();
        let job = Job {
            model: model.clone(),
            work,
            accepted: Instant::now(),
            caller: Caller { reply, room },
        };
        // Only a panic closes the other end of either channel.
        let lost = || Failure::Model("the computation panicked".to_owned());
        self.queue.send(job).map_err(|_| lost())?;
        let values = answer.await.map_err(|_| lost())??;
        match values.iter().find(|value| !value.is_finite()) {
            Some(value) => Err(Failure::Model(format!("the model answers {value}"))),
            None => Ok(values),
        }
    }
}

impl Work {
    fn rows(&self) -> usize {
        match self {
            Self::Examples { count, .. } => *count,
            Self::Candidates { movies, .. } => movies.len(),
            Self::Bags {
                indices, offsets, ..
            } => indices.len().max(offsets.len()),
        }
    }

    /// How many answers there are: one per example, movie or bag, all of the same number of values.
    fn answers(&self) -> usize {
        match self {
            Self::Examples { count, .. } => *count,
            Self::Candidates { movies, .. } => movies.len(),
            Self::Bags { offsets, .. } => offsets.len(),
        }
    }

    /// Appends the rows of `other`, or returns it if one computation cannot answer both.
    fn join(&mut self, other: Self) -> Option<Self> {
        match (self, other) {
            (
                Self::Examples { batch, count },
                Self::Examples {
                    batch: more,
                    count: others,
                },
            ) => {
                batch.append(more);
                *count += others;
                None
            }
            (
                Self::Bags {
                    table,
                    indices,
                    offsets,
                },
                Self::Bags {
                    table: same,
                    indices: more,
                    offsets: starts,
                },
            ) if *table == same => {
                let start = indices.len() as i64;
                indices.extend(more);
                offsets.extend(starts.iter().map(|offset| start + offset));
                None
            }
            (_, other) => Some(other),
        }
    }
}

/// Gathers and computes batches until the queue is closed.
async fn run(mut jobs: mpsc::UnboundedReceiver<Job>, limits: Limits, metrics: Batches) {
    let turns = Arc::new(Semaphore::new(limits.batches));
    let mut next = None;
    // A batch is gathered when it can be computed, so that it holds all that came before. The semaphore is never closed.
    while let Ok(turn) = turns.clone().acquire_owned().await {
        let Some(batch) = gather(&mut jobs, &mut next, limits).await else {
            return;
        };
        let rows: usize = batch.iter().map(|job| job.work.rows()).sum();
        metrics.requests.observe(batch.len() as f64);
        metrics.rows.observe(rows as f64);
        let seconds = metrics.seconds.clone();
        // Off the threads that serve connections. The callers of a computation that panics learn of it by their replies.
        tokio::task::spawn_blocking(move || {
            let start = Instant::now();
            if catch_unwind(AssertUnwindSafe(|| compute(batch))).is_err() {
                tracing::error!("a batch panicked");
            }
            seconds.observe(start.elapsed().as_secs_f64());
            drop(turn);
        });
    }
}

/// The next batch; `next` keeps the job that did not fit into it.
async fn gather(
    jobs: &mut mpsc::UnboundedReceiver<Job>,
    next: &mut Option<Job>,
    limits: Limits,
) -> Option<Vec<Job>> {
    let first = match next.take() {
        Some(job) => job,
        None => jobs.recv().await?,
    };
    let deadline = first.accepted + limits.deadline;
    let mut rows = first.work.rows();
    let mut batch = vec![first];
    while rows < limits.batch_rows {
        let job = match jobs.try_recv() {
            // A timer rounds up to whole milliseconds, so one for a deadline that has passed would still wait.
            Err(TryRecvError::Empty) if Instant::now() < deadline => {
                timeout_at(deadline, jobs.recv()).await.ok().flatten()
            }
            queued => queued.ok(),
        };
        let Some(job) = job else { break };
        rows += job.work.rows();
        if rows > limits.batch_rows {
            *next = Some(job);
            break;
        }
        batch.push(job);
    }
    Some(batch)
}

/// Jobs that one computation answers.
struct Group {
    model: Arc<Model>,
    work: Work,
    callers: Vec<(usize, Caller)>,
}

impl Group {
    fn new(job: Job) -> Self {
        Self {
            callers: vec![(job.work.answers(), job.caller)],
            model: job.model,
            work: job.work,
        }
    }

    /// Adds the job, or returns it if it does not belong here.
    fn join(&mut self, job: Job) -> Option<Job> {
        if !Arc::ptr_eq(&self.model, &job.model) {
            return Some(job);
        }
        let answers = job.work.answers();
        match self.work.join(job.work) {
            None => {
                self.callers.push((answers, job.caller));
                None
            }
            Some(work) => Some(Job { work, ..job }),
        }
    }

    fn answer(self) {
        match self.model.compute(&self.work) {
            Ok(values) => {
                let width = values.len() / self.work.answers().max(1);
                let mut values = values.as_slice();
                for (answers, caller) in self.callers {
                    let (own, rest) = values.split_at(answers * width);
                    values = rest;
                    caller.answer(Ok(own.to_vec()));
                }
            }
            Err(error) => {
                let message = format!("{error:#}");
                for (_, caller) in self.callers {
                    caller.answer(Err(Failure::Model(message.clone())));
                }
            }
        }
    }
}

fn compute(batch: Vec<Job>) {
    let mut groups: Vec<Group> = Vec::new();
    // Nothing is computed for callers that have gone.
    for job in batch
        .into_iter()
        .filter(|job| !job.caller.reply.is_closed())
    {
        let left = groups
            .iter_mut()
            .try_fold(job, |job, group| group.join(job));
        groups.extend(left.map(Group::new));
    }
    groups.into_iter().for_each(Group::answer);
}
