//! The program `serve` as a process, asked by an HTTP client. Its models are those that the program `recommender` trains on generated
//! data.

mod answers;
mod batches;
mod clicks;
mod cold_start;
mod connections;
mod models;
mod operation;
mod reloads;
mod support;
