//! Hashed embedding bags for [candle](https://github.com/huggingface/candle).
#![warn(missing_docs)]

mod bags;
pub mod checkpoint;
mod hash;
mod layer;
mod op;

pub use bags::BoundsCheck;
pub use checkpoint::Checkpoint;
pub use hash::{Affine, Hash, Mix, Overflow};
pub use layer::{
    hashed_embedding, hashed_embedding_bag, HashedEmbedding, HashedEmbeddingBag,
    HashedEmbeddingBagConfig,
};
pub use op::Mode;
