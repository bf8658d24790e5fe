//! The model: a DLRM (Naumov et al. 2019, <https://arxiv.org/abs/1906.00091>) over pooled hashed embeddings.
//!
//! ```text
//!    numbers          table  table  …  table     bags of rows, in collections of hashed tables
//!       │               │      │         │
//!   bottom MLP          │      │         │       only where examples have numbers
//!       └───────────────┴──────┴─┬───────┘
//!                    vectors (batch, n, embedding_dim)
//!               ┌────────────────┴────────────────┐
//!          as they are              dots of all n (n - 1) / 2 pairs
//!               └────────────────┬────────────────┘
//!                         top MLP ──> logit
//! ```
//!
//! The tables and all that follows them can be computed apart, so that [`train`](crate::train) can look up a whole batch at once
//! and compute the rest in shards.

use anyhow::{bail, ensure, Context, Result};
use candle_core::{DType, Device, Tensor};
use candle_hashed_embedding_bag::{Bits, Checkpoint, Gradient};
use candle_nn::init::DEFAULT_KAIMING_NORMAL;
use candle_nn::{Init, VarBuilder};

use crate::data::{Batch, Examples, Schema};
use crate::embeddings::{EmbeddingConfig, Embeddings, Lookup};
use crate::ops::{self, Interaction, TopInput};

/// The widths of the hidden layers of both MLPs, if nothing else is said.
pub const HIDDEN: [usize; 2] = [64, 32];

/// How to make a model.
#[derive(Clone, Debug)]
pub struct ModelConfig {
    /// Its embedding tables.
    pub embeddings: EmbeddingConfig,
    /// The widths of the hidden layers of the bottom MLP, whose last layer has `embedding_dim` outputs.
    pub bottom: Vec<usize>,
    /// The widths of the hidden layers of the top MLP.
    pub top: Vec<usize>,
    /// What the top MLP reads besides the dots.
    pub input: TopInput,
    /// How the gradients of the embedding tables are summed on a GPU.
    pub gradient: Gradient,
}

impl From<EmbeddingConfig> for ModelConfig {
    /// The default layers over these tables.
    fn from(embeddings: EmbeddingConfig) -> Self {
        Self {
            embeddings,
            bottom: HIDDEN.to_vec(),
            top: HIDDEN.to_vec(),
            input: TopInput::Vectors,
            gradient: Gradient::Fastest,
        }
    }
}

/// The dtype of matrix products. Parameters and their gradients are f32 in any case.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Precision {
    /// f32.
    F32,
    /// f32 whose factors the tensor cores of a GPU round to 10 bits of mantissa.
    Tf32,
    /// bf16: vectors, activations and a copy of the weights.
    Bf16,
}

/// Scores examples.
#[derive(Clone)]
pub struct Dlrm {
    embeddings: Embeddings,
    /// How many numbers an example has.
    numbers: usize,
    bottom: Option<Mlp>,
    interaction: Interaction,
    top: Mlp,
    precision: Precision,
    device: Device,
}

/// A batch on the device of a model.
pub struct Inputs {
    /// `(batch, numbers)`, if there are numbers.
    pub numbers: Option<Tensor>,
    /// What to look up in each collection of tables.
    pub lookups: Vec<Lookup>,
}

/// Linear layers with ReLU between them.
#[derive(Clone)]
struct Mlp {
    first: Layer,
    rest: Vec<Layer>,
}

/// A linear layer.
#[derive(Clone)]
struct Layer {
    /// `(outputs, inputs)`.
    weight: Tensor,
    /// `(outputs,)`.
    bias: Tensor,
}

impl Dlrm {
    /// A new model, with variables from `vb`.
    ///
    /// # Errors
    /// A compression that leaves the large tables less than one block of the hash.
    pub fn new(schema: &Schema, config: &ModelConfig, vb: VarBuilder) -> Result<Self> {
        let embeddings = Embeddings::new(schema, config.embeddings, config.gradient, vb.clone())?;
        Self::with_embeddings(embeddings, schema, config, vb)
    }

    /// A new model for examples; see [`Embeddings::for_examples`].
    ///
    /// # Errors
    /// Those of the [`Embeddings`].
    pub fn for_examples(
        examples: &dyn Examples,
        config: &ModelConfig,
        vb: VarBuilder,
    ) -> Result<Self> {
        let embeddings =
            Embeddings::for_examples(examples, config.embeddings, config.gradient, vb.clone())?;
        Self::with_embeddings(embeddings, &examples.schema(), config, vb)
    }

    fn with_embeddings(
        embeddings: Embeddings,
        schema: &Schema,
        config: &ModelConfig,
        vb: VarBuilder,
    ) -> Result<Self> {
        let dim = embeddings.embedding_dim();
        let bottom = (schema.numbers > 0)
            .then(|| Mlp::new(schema.numbers, &config.bottom, dim, vb.pp("bottom")))
            .transpose()?;
        let interaction = Interaction {
            tables: embeddings.num_tables(),
            bottom: bottom.is_some(),
            dim,
            input: config.input,
        };
        let top = Mlp::new(interaction.width(), &config.top, 1, vb.pp("top"))?;
        Self::over(embeddings, schema, bottom, interaction, top, vb.device())
    }

    /// The model of a checkpoint, which tells the widths of its layers.
    ///
    /// # Errors
    /// Tables or layers that do not fit the schema.
    pub fn open(schema: &Schema, checkpoint: &Checkpoint, device: &Device) -> Result<Self> {
        let embeddings = Embeddings::open(schema, checkpoint, device)?;
        let bottom = (schema.numbers > 0)
            .then(|| Mlp::open(checkpoint, "bottom", device))
            .transpose()?;
        let top = Mlp::open(checkpoint, "top", device)?;
        let interaction = |input| Interaction {
            tables: embeddings.num_tables(),
            bottom: bottom.is_some(),
            dim: embeddings.embedding_dim(),
            input,
        };
        let known = [TopInput::Vectors, TopInput::Bottom].map(interaction);
        let width = top.inputs();
        let interaction = known.into_iter().find(|known| known.width() == width);
        let interaction = interaction.with_context(|| {
            format!("the top MLP takes {width} values, which are not those of its vectors and dots")
        })?;
        if let Some(mlp) = &bottom {
            ensure!(
                (mlp.inputs(), mlp.outputs()) == (schema.numbers, interaction.dim),
                "the bottom MLP turns {} numbers into {} values, not {} into {}",
                mlp.inputs(),
                mlp.outputs(),
                schema.numbers,
                interaction.dim
            );
        }
        ensure!(
            top.outputs() == 1,
            "the top MLP has {} outputs",
            top.outputs()
        );
        Self::over(embeddings, schema, bottom, interaction, top, device)
    }

    /// The same model, in which rows of tables with few training examples share one: see
    /// [`Embeddings::sharing_rare_rows`].
    pub fn sharing_rare_rows(mut self, counts: &[Vec<u32>], min_count: u32) -> Self {
        self.embeddings = self.embeddings.sharing_rare_rows(counts, min_count);
        self
    }

    /// The same model, whose tables keep a sparse gradient: see [`Embeddings::with_sparse_gradients`].
    ///
    /// # Errors
    /// Those of [`Embeddings::with_sparse_gradients`].
    pub fn with_sparse_gradients(mut self) -> Result<Self> {
        self.embeddings = self.embeddings.with_sparse_gradients()?;
        Ok(self)
    }

    /// The same model with its tables in 8 or 4 bits, for serving, and the relative error of each collection.
    ///
    /// # Errors
    /// Those of [`Embeddings::to_bits`].
    pub fn to_bits(&self, bits: Bits) -> Result<(Self, Vec<(&'static str, f64)>)> {
        let (embeddings, errors) = self.embeddings.to_bits(bits)?;
        let model = Self {
            embeddings,
            ..self.clone()
        };
        Ok((model, errors))
    }

    fn over(
        embeddings: Embeddings,
        schema: &Schema,
        bottom: Option<Mlp>,
        interaction: Interaction,
        top: Mlp,
        device: &Device,
    ) -> Result<Self> {
        Ok(Self {
            embeddings,
            numbers: schema.numbers,
            bottom,
            interaction,
            top,
            precision: Precision::F32,
            device: device.clone(),
        })
    }

    /// The same model with products of another precision.
    ///
    /// # Errors
    /// A precision that the CPU does not have.
    pub fn with_precision(self, precision: Precision) -> Result<Self> {
        ensure!(
            precision == Precision::F32 || !self.device.is_cpu(),
            "the CPU computes in f32 only: a lower precision needs a GPU"
        );
        candle_core::cuda::set_gemm_reduced_precision_f32(precision == Precision::Tf32);
        Ok(Self { precision, ..self })
    }

    /// A batch as tensors on the device of the model.
    ///
    /// # Errors
    /// What the device says.
    pub fn inputs(&self, batch: &Batch) -> candle_core::Result<Inputs> {
        let numbers = (self.numbers > 0).then(|| {
            let examples = batch.numbers.len() / self.numbers;
            Tensor::from_slice(&batch.numbers, (examples, self.numbers), &self.device)
        });
        Ok(Inputs {
            numbers: numbers.transpose()?,
            lookups: self.embeddings.lookups(&batch.rows, &self.device)?,
        })
    }

    /// One logit per example.
    ///
    /// # Errors
    /// What the device says.
    pub fn forward(&self, inputs: &Inputs) -> candle_core::Result<Tensor> {
        let vectors = self.embeddings.forward(&inputs.lookups)?;
        self.logits(inputs.numbers.as_ref(), &vectors)
    }

    /// One logit per example, given the pooled vectors `(batch, tables, embedding_dim)` of the [`Embeddings`].
    ///
    /// # Errors
    /// What the device says.
    pub fn logits(
        &self,
        numbers: Option<&Tensor>,
        vectors: &Tensor,
    ) -> candle_core::Result<Tensor> {
        let vectors = match self.precision {
            Precision::Bf16 => vectors.to_dtype(DType::BF16)?,
            Precision::F32 | Precision::Tf32 => vectors.clone(),
        };
        let bottom = match (&self.bottom, numbers) {
            (Some(mlp), Some(numbers)) => {
                Some(mlp.forward_relu(&numbers.to_dtype(vectors.dtype())?)?)
            }
            _ => None,
        };
        let hidden = self.first_of_top(&vectors, bottom, !self.top.rest.is_empty())?;
        self.rest_of_top(hidden)
    }

    /// The outputs of the first layer of the top MLP before its activation, `(batch, outputs)`, for examples without numbers.
    ///
    /// # Errors
    /// What the device says.
    pub fn first_outputs(&self, vectors: &Tensor) -> candle_core::Result<Tensor> {
        self.first_of_top(vectors, None, false)
    }

    /// The bias of that layer, `(outputs,)`.
    pub fn first_bias(&self) -> &Tensor {
        &self.top.first.bias
    }

    /// One logit per example, given the [`first_outputs`](Self::first_outputs).
    ///
    /// # Errors
    /// What the device says.
    pub fn after_first(&self, outputs: Tensor) -> candle_core::Result<Tensor> {
        self.rest_of_top(if self.top.rest.is_empty() {
            outputs
        } else {
            outputs.relu()?
        })
    }

    /// The weights that the first layer of the top MLP gives to the dots of vector `a` with vector `b`, for each `a` and, within it,
    /// each output a row with a weight for each `b`: `(a.len() * outputs, b.len())`. No vector may be in both.
    ///
    /// # Errors
    /// What the device says.
    pub fn weights_of_dots(&self, a: &[usize], b: &[usize]) -> candle_core::Result<Tensor> {
        let weight = self.top.first.weight.detach();
        let weight = weight.to_device(&Device::Cpu)?.to_vec2::<f32>()?;
        // The pairs of vector i with the vectors before it follow those of the vectors before i.
        let column = |a: usize, b: usize| {
            let (i, j) = (a.max(b), a.min(b));
            self.interaction.kept() + i * i.saturating_sub(1) / 2 + j
        };
        let rows = a
            .iter()
            .flat_map(|&a| weight.iter().map(move |row| (a, row)));
        let weights = rows.flat_map(|(a, row)| b.iter().map(move |&b| row[column(a, b)]));
        let shape = (a.len() * weight.len(), b.len());
        Tensor::from_vec(weights.collect(), shape, &self.device)
    }

    fn rest_of_top(&self, hidden: Tensor) -> candle_core::Result<Tensor> {
        let logits = self.top.forward_rest(hidden)?;
        logits.squeeze(1)?.to_dtype(DType::F32)
    }

    /// The first layer of the top MLP, applied to what the interaction of the vectors yields.
    fn first_of_top(
        &self,
        vectors: &Tensor,
        bottom: Option<Tensor>,
        relu: bool,
    ) -> candle_core::Result<Tensor> {
        let Layer { weight, bias } = &self.top.first;
        let inputs = self.interaction.apply(vectors, bottom.as_ref())?;
        // Zeros behind the dots meet zeros behind the weights.
        let zeros = inputs.dim(1)? - weight.dim(1)?;
        let weight = match zeros {
            0 => weight.clone(),
            _ => weight.pad_with_zeros(1, 0, zeros)?,
        };
        ops::linear(&inputs, &weight, bias, relu)
    }

    /// The most values that an example has in any tensor between its rows and its logit.
    pub fn widest(&self) -> usize {
        let sizes = self.interaction;
        let vectors = sizes.vectors() * sizes.dim;
        let outputs = self.layers().map(Layer::outputs);
        outputs.fold(vectors.max(sizes.width()), usize::max)
    }

    /// The number of values of the largest parameter of the MLPs.
    pub fn largest(&self) -> usize {
        let weights = self.layers().map(|layer| layer.weight.elem_count());
        weights.max().unwrap_or(0)
    }

    fn layers(&self) -> impl Iterator<Item = &Layer> {
        self.bottom.iter().chain([&self.top]).flat_map(Mlp::layers)
    }

    /// The device of its parameters, to which its inputs belong.
    pub fn device(&self) -> &Device {
        &self.device
    }

    /// Its embedding tables.
    pub fn embeddings(&self) -> &Embeddings {
        &self.embeddings
    }
}

impl Layer {
    /// Initialised as `candle_nn::linear` does it.
    fn new(inputs: usize, outputs: usize, vb: VarBuilder) -> candle_core::Result<Self> {
        let bound = 1.0 / (inputs as f64).sqrt();
        let init = Init::Uniform {
            lo: -bound,
            up: bound,
        };
        Ok(Self {
            weight: vb.get_with_hints((outputs, inputs), "weight", DEFAULT_KAIMING_NORMAL)?,
            bias: vb.get_with_hints(outputs, "bias", init)?,
        })
    }

    fn inputs(&self) -> usize {
        self.weight.dims()[1]
    }

    fn outputs(&self) -> usize {
        self.weight.dims()[0]
    }

    fn forward(&self, x: &Tensor, relu: bool) -> candle_core::Result<Tensor> {
        ops::linear(x, &self.weight, &self.bias, relu)
    }
}

impl Mlp {
    /// Layers `0`, `1`, … of the given widths.
    fn new(
        inputs: usize,
        hidden: &[usize],
        outputs: usize,
        vb: VarBuilder,
    ) -> candle_core::Result<Self> {
        let widths = [&[inputs], hidden, &[outputs]].concat();
        let first = Layer::new(inputs, widths[1], vb.pp(0))?;
        let rest = (1..).zip(widths[1..].windows(2));
        let rest = rest.map(|(i, width)| Layer::new(width[0], width[1], vb.pp(i)));
        Ok(Self {
            first,
            rest: rest.collect::<candle_core::Result<_>>()?,
        })
    }

    /// The layers of a checkpoint under `name`.
    fn open(checkpoint: &Checkpoint, name: &str, device: &Device) -> Result<Self> {
        let vb = checkpoint.var_builder(DType::F32, device).pp(name);
        let layer = |i: usize| -> Result<Layer> {
            let weight = format!("{name}.{i}.weight");
            let info = checkpoint.tensor_info(&weight)?;
            let &[outputs, inputs] = &info.shape[..] else {
                bail!("tensor {weight} is no matrix")
            };
            Ok(Layer::new(inputs, outputs, vb.pp(i))?)
        };
        let mut mlp = Self {
            first: layer(0)?,
            rest: Vec::new(),
        };
        for i in 1.. {
            let weight = format!("{name}.{i}.weight");
            if checkpoint.tensor_info(&weight).is_err() {
                break;
            }
            let next = layer(i)?;
            let (width, inputs) = (mlp.outputs(), next.inputs());
            ensure!(
                width == inputs,
                "tensor {weight} takes {inputs} values, but the layer before has {width}"
            );
            mlp.rest.push(next);
        }
        Ok(mlp)
    }

    fn layers(&self) -> impl Iterator<Item = &Layer> {
        [&self.first].into_iter().chain(&self.rest)
    }

    fn inputs(&self) -> usize {
        self.first.inputs()
    }

    fn outputs(&self) -> usize {
        self.rest.last().unwrap_or(&self.first).outputs()
    }

    /// With ReLU after the last layer, too.
    fn forward_relu(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let x = self.first.forward(x, true)?;
        let mut rest = self.rest.iter();
        rest.try_fold(x, |x, layer| layer.forward(&x, true))
    }

    /// The layers after the first.
    fn forward_rest(&self, x: Tensor) -> candle_core::Result<Tensor> {
        let mut left = self.rest.len();
        let mut rest = self.rest.iter();
        rest.try_fold(x, |x, layer| {
            left -= 1;
            layer.forward(&x, left > 0)
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{Catalog, Source};
    use crate::init::seeded;
    use candle_hashed_embedding_bag::Hash;
    use candle_nn::VarMap;

    fn model(embeddings: EmbeddingConfig) -> Result<(Catalog, Dlrm)> {
        let catalog = Source::Generated { seed: 0 }.load()?.catalog;
        let vb = seeded(&VarMap::new(), 1, &Device::Cpu);
        let model = Dlrm::new(&catalog.schema(), &embeddings.into(), vb)?;
        Ok((catalog, model))
    }

    #[test]
    fn an_example_does_not_depend_on_its_batch() -> Result<()> {
        let (catalog, model) = model(EmbeddingConfig {
            embedding_dim: 8,
            inner_dim: None,
            compression: 0.25,
            hash: Hash::default_for(8),
        })?;
        let logits = |pairs: &[(u32, u32)]| -> Result<Vec<f32>> {
            Ok(model
                .forward(&model.inputs(&catalog.batch(pairs))?)?
                .to_vec1()?)
        };
        let (together, alone) = (logits(&[(1, 2), (3, 4), (1, 4)])?, logits(&[(3, 4)])?);
        assert!((together[1] - alone[0]).abs() < 1e-5);
        Ok(())
    }
}
