//! A recommender whose embedding tables are hashed: what the programs `recommender`, which trains, and `serve` share.
//!
//! ```text
//! options ──> data ──> train ──> evaluate ──> saved ──> recommend, or the server
//!                        │
//!                      model = embeddings (hashed) + MLPs, begun by init
//! ```
//!
//! | module | |
//! |---|---|
//! | [`options`] | the command line of `recommender` |
//! | [`data`] | examples: ratings of MovieLens or of a generator, or a log of clicks, as batches of bags of rows |
//! | [`model`] | the DLRM: embeddings, dots, MLPs |
//! | [`ops`] | its layers and its interaction as fused operations |
//! | [`embeddings`] | the embedding tables in two collections, and how the parameters are divided among them |
//! | [`init`] | initial values that depend on the seed alone |
//! | [`train`] | the loop over epochs and steps, best epoch |
//! | [`optimizers`] | what updates the tables and the MLPs |
//! | [`order`] | the order of the examples, and how it is divided among ranks |
//! | [`step`] | the loss of a batch and its gradients, in shards on a CPU |
//! | [`resident`] | the train part kept on a GPU |
//! | [`ranks`] | several processes that train one model |
//! | [`resume`] | the state of a training in a file |
//! | [`rare`] | rows with few training examples, which share one |
//! | [`evaluate`] | AUC and logloss |
//! | [`ranking`] | how good top tens are |
//! | [`baselines`] | the model beside popularity and a constant |
//! | [`about`] | what a checkpoint says of itself |
//! | [`saved`] | one checkpoint file with everything that a trained model needs |
//! | [`profiles`] | users and movies as the model reads them, whether the catalogue has them or not |
//! | [`popularity`] | what is liked by many |
//! | [`candidates`] | all movies, ready to be scored for any user |
//! | [`recommend`] | the best unseen movies |
//! | [`score`] | a probability for each line of a file |
//! | [`sweep`] | many trainings: AUC against size, as a table, a .csv and an .svg |
//! | [`progress`] | how far an epoch is |
//! | [`report`] | what is printed |
//! | [`alike`] | which rows are used alike, for hashes by which those share memory |
//! | [`catalogue`] | how the movies of a model differ from those of another |
//! | [`threads`] | how many compute |
//! | [`allocator`] | the memory of both programs |
//! | [`output`] | standard output that may be closed, files that may not be writable |

#![warn(missing_docs)]

pub mod about;
pub mod alike;
pub mod allocator;
pub mod baselines;
pub mod candidates;
pub mod catalogue;
pub mod data;
pub mod embeddings;
pub mod evaluate;
pub mod init;
pub mod model;
pub mod ops;
pub mod optimizers;
// Its doc comments are the help texts of the command line.
#[allow(missing_docs)]
pub mod options;
pub mod order;
pub mod output;
pub mod popularity;
pub mod profiles;
pub mod progress;
pub mod ranking;
pub mod ranks;
pub mod rare;
pub mod recommend;
pub mod report;
pub mod resident;
pub mod resume;
pub mod saved;
pub mod score;
pub mod step;
pub mod sweep;
pub mod threads;
pub mod train;
