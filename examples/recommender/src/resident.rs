//! The train part kept on the device of a model, so that a step uploads nothing but the order of its examples.

use anyhow::{bail, Context, Result};
use candle_core::Tensor;

use crate::data::{Examples, Part, Rows};
use crate::model::{Dlrm, Inputs};
use crate::order::Order;

/// Examples that are read and uploaded at once.
const CHUNK: usize = 1 << 16;

/// The train part of some examples, on a device.
pub struct Resident<'a> {
    model: &'a Dlrm,
    /// `(examples, numbers)`, if there are numbers.
    numbers: Option<Tensor>,
    /// `(examples, tables)`.
    rows: Tensor,
    /// `(examples,)`, f32.
    labels: Tensor,
}

impl<'a> Resident<'a> {
    /// Reads and uploads the train part, of which this rank trains on what `order` says.
    ///
    /// # Errors
    /// What reading says, too little memory on the device, and examples that are bags of rows.
    pub fn load(model: &'a Dlrm, examples: &dyn Examples, order: &Order) -> Result<Self> {
        let schema = examples.schema();
        let device = model.device();
        let (mut numbers, mut rows, mut labels) = (Vec::new(), Vec::new(), Vec::new());
        for batch in examples.batches_at(Part::Train, order.own_positions(), CHUNK, None)? {
            let (batch, batch_labels) = batch?;
            let shared = model.embeddings().shared(&batch.rows);
            let Rows::OnePerTable(batch_rows) = &*shared else {
                bail!("only examples with one row per table can be kept on the device")
            };
            let n = batch_labels.len();
            if schema.numbers > 0 {
                let shape = (n, schema.numbers);
                numbers.push(Tensor::from_slice(&batch.numbers, shape, device)?);
            }
            let shape = (n, schema.tables.len());
            rows.push(Tensor::from_slice(batch_rows, shape, device)?);
            let as_f32: Vec<_> = batch_labels
                .iter()
                .map(|&l| f32::from(u8::from(l)))
                .collect();
            labels.push(Tensor::new(as_f32, device)?);
        }
        let join = |tensors: &[Tensor]| Tensor::cat(tensors, 0).context("keeping the train part");
        Ok(Self {
            model,
            numbers: if numbers.is_empty() {
                None
            } else {
                Some(join(&numbers)?)
            },
            rows: join(&rows)?,
            labels: join(&labels)?,
        })
    }

    /// All examples once, in the next order, without the first `done` batches: their inputs and labels.
    ///
    /// # Errors
    /// More examples than 32-bit indices.
    pub fn batches(
        &'a self,
        order: &mut Order,
        done: usize,
    ) -> Result<impl Iterator<Item = Result<(Inputs, Tensor)>> + 'a> {
        let (examples, batch_size) = (self.labels.dim(0)?, order.own_batch_size());
        let order = Tensor::new(order.positions()?, self.model.device())?;
        let starts = (0..examples).step_by(batch_size).skip(done);
        Ok(starts.map(move |start| {
            let order = order.narrow(0, start, batch_size.min(examples - start))?;
            let pick = |tensor: &Tensor| tensor.index_select(&order, 0);
            let inputs = Inputs {
                numbers: self.numbers.as_ref().map(pick).transpose()?,
                lookups: self.model.embeddings().lookups_of(&pick(&self.rows)?)?,
            };
            Ok((inputs, pick(&self.labels)?))
        }))
    }
}
