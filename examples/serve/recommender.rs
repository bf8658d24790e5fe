//! The modules of `examples/recommender` that a server needs, from where they stand. It asks a trained model and never
//! trains one, so part of them has no use here.
#![allow(dead_code, unused_imports)]

#[path = "../recommender/data/mod.rs"]
pub mod data;
#[path = "../recommender/embeddings.rs"]
pub mod embeddings;
#[path = "../recommender/evaluate.rs"]
pub mod evaluate;
#[path = "../recommender/model.rs"]
pub mod model;
#[path = "../recommender/options.rs"]
pub mod options;
#[path = "../recommender/recommend.rs"]
pub mod recommend;
#[path = "../recommender/saved.rs"]
pub mod saved;
#[path = "../recommender/train.rs"]
pub mod train;
