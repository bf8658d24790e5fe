//! What updates the parameters: AdamW the MLPs, and one of several optimisers the embedding tables. Learning rates fall linearly to
//! zero.
//!
//! A batch looks up few of the rows of large tables. All but AdamW leave the others as they are, so the gradient of the tables need
//! not be a tensor of their size: on one rank they keep a sparse gradient, and a step costs what it looks up.

use anyhow::Result;
use candle_core::backprop::GradStore;
use candle_core::Var;
use candle_hashed_embedding_bag::optim::{
    Adagrad, AdamW, ParamsAdagrad, ParamsAdamW, ParamsSgd, ParamsSparseAdam, Sgd, SparseAdam,
};
use candle_nn::{Optimizer, VarMap};
use clap::ValueEnum;

use crate::resume::Tensors;
use crate::step::{variables, TABLE};
use crate::train::Settings;

/// Weight decay of the MLPs, if nothing else is said.
pub const MLP_DECAY: f64 = 0.01;

/// What updates the embedding tables.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum TableOptimizer {
    /// Adam with decoupled weight decay, which moves every value in every step.
    Adamw,
    /// Adagrad, which moves what was looked up.
    Adagrad,
    /// Adam that moves what was looked up.
    SparseAdam,
    /// Plain gradient descent, which moves what was looked up.
    Sgd,
}

impl TableOptimizer {
    /// Whether values without a gradient stay as they are.
    pub fn is_sparse(self) -> bool {
        self != Self::Adamw
    }

    /// The learning rate of the tables, unless the user chooses one, for that of the MLPs. Tables learn faster than MLPs, since a row
    /// is in few of the examples.
    pub fn default_lr(self, lr: f64) -> f64 {
        lr * match self {
            Self::Adamw => 3.0,
            Self::SparseAdam => 1.0,
            Self::Adagrad => 10.0,
            Self::Sgd => 500.0,
        }
    }
}

/// The optimisers of a training.
pub struct Optimizers {
    tables: Tables,
    mlps: AdamW,
    lr: f64,
    table_lr: f64,
    step: usize,
    steps: usize,
}

enum Tables {
    Adamw(AdamW),
    Adagrad(Adagrad),
    SparseAdam(SparseAdam),
    Sgd(Sgd),
}

/// Evaluates an expression of the optimiser of the tables.
macro_rules! with_tables {
    ($tables:expr, $optimizer:ident => $body:expr) => {
        match $tables {
            Tables::Adamw($optimizer) => $body,
            Tables::Adagrad($optimizer) => $body,
            Tables::SparseAdam($optimizer) => $body,
            Tables::Sgd($optimizer) => $body,
        }
    };
}

impl Tables {
    fn new(vars: Vec<(String, Var)>, settings: Settings) -> Result<Self> {
        Ok(match settings.table_optimizer {
            TableOptimizer::Adamw => Self::Adamw(adamw(vars, settings.table_decay)?),
            TableOptimizer::Adagrad => {
                Self::Adagrad(Adagrad::with_names(vars, ParamsAdagrad::default())?)
            }
            TableOptimizer::SparseAdam => {
                Self::SparseAdam(SparseAdam::with_names(vars, ParamsSparseAdam::default())?)
            }
            TableOptimizer::Sgd => Self::Sgd(Sgd::with_names(vars, ParamsSgd::default())?),
        })
    }
}

fn adamw(vars: Vec<(String, Var)>, weight_decay: f64) -> Result<AdamW> {
    let params = ParamsAdamW {
        weight_decay,
        ..Default::default()
    };
    Ok(AdamW::with_names(vars, params)?)
}

impl Optimizers {
    /// For the variables in `vars`, over so many steps.
    ///
    /// # Errors
    /// A thread that panicked while it held the variables.
    pub fn new(vars: &VarMap, settings: Settings, steps: usize) -> Result<Self> {
        Ok(Self {
            tables: Tables::new(variables(vars, true)?, settings)?,
            mlps: adamw(variables(vars, false)?, settings.mlp_decay)?,
            lr: settings.lr,
            table_lr: settings.table_lr,
            step: 0,
            steps,
        })
    }

    /// The steps taken so far.
    pub fn steps_done(&self) -> usize {
        self.step
    }

    /// Moves all parameters by these gradients, and the tables by their sparse ones.
    ///
    /// # Errors
    /// What the device says.
    pub fn step(&mut self, gradients: &GradStore) -> Result<()> {
        let left = 1.0 - self.step as f64 / self.steps as f64;
        self.step += 1;
        with_tables!(&mut self.tables, tables => {
            tables.set_learning_rate(self.table_lr * left);
            tables.step(gradients)?;
        });
        self.mlps.set_learning_rate(self.lr * left);
        self.mlps.step(gradients)?;
        Ok(())
    }

    /// The state of both, by the names of the variables, which differ.
    ///
    /// # Errors
    /// What the device says.
    pub fn state(&self) -> Result<Tensors> {
        let tables = with_tables!(&self.tables, tables => tables.state()?);
        Ok(tables.into_iter().chain(self.mlps.state()?).collect())
    }

    /// Goes on from a [`state`](Self::state) after so many steps.
    ///
    /// # Errors
    /// The state of other variables or of another optimiser.
    pub fn restore(&mut self, state: Tensors, step: usize) -> Result<()> {
        let is_of_table = |name: &str| {
            let parameter = name
                .rsplit_once('.')
                .map_or(name, |(parameter, _)| parameter);
            parameter.ends_with(TABLE)
        };
        let (of_tables, of_mlps): (Tensors, Tensors) =
            state.into_iter().partition(|(name, _)| is_of_table(name));
        with_tables!(&mut self.tables, tables => tables.load_state(of_tables)?);
        self.mlps.load_state(of_mlps)?;
        self.step = step;
        Ok(())
    }
}
