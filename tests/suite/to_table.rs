//! `to_table`: the rows of a layer as a table.

use crate::common::{floats, message, on_each_device, to_vec, unlike_the_default, Draws, MODES};
use candle_core::{DType, Device, Result, Tensor, Var};
use candle_hashed_embedding_bag::{HashedEmbedding, HashedEmbeddingBag, HashedEmbeddingBagConfig};

#[test]
fn the_table_is_the_rows_of_lookups() -> Result<()> {
    on_each_device(|device| {
        let weight = Var::from_tensor(&floats(&Draws::new(4).halves(64), DType::F32, device)?)?;
        for mode in MODES {
            let config = HashedEmbeddingBagConfig {
                mode,
                sparse: false,
                ..unlike_the_default()
            };
            let bag = HashedEmbeddingBag::new(weight.as_tensor().clone(), 30, 6, config)?;
            let table = bag.to_table(..)?;
            assert_eq!(table.dims(), [30, 6]);
            let values = to_vec(&table)?;
            let parameter = to_vec(bag.hashed_weight())?;
            for (at, value) in values.iter().enumerate() {
                let (row, column) = (at / 6, at % 6);
                let (slot, sign) = bag.hash().slot(row as i64 + 5, column, 64)?;
                let want = if row == 7 {
                    0.0
                } else {
                    f64::from(sign) * parameter[slot]
                };
                assert_eq!(*value, want, "{mode:?} row {row} column {column}");
            }
            for (part, start, end) in [
                (bag.to_table(3..9)?, 3, 9),
                (bag.to_table(28..)?, 28, 30),
                (bag.to_table(..=4)?, 0, 5),
                (bag.to_table(29..=29)?, 29, 30),
            ] {
                assert_eq!(part.dims(), [end - start, 6]);
                assert_eq!(to_vec(&part)?, values[start * 6..end * 6]);
            }
            let rows = HashedEmbedding::from(bag.clone()).to_table(3..9)?;
            assert_eq!(to_vec(&rows)?, values[18..54]);
            // As every lookup, it has a gradient: each slot's is the sum of the signs of its 29 rows.
            let grads = table.sum_all()?.backward()?;
            let grad = grads.get(&weight).expect("a gradient of the parameter");
            let mut want = vec![0.0; 64];
            for (row, column) in (0..30).flat_map(|row| (0..6).map(move |column| (row, column))) {
                let (slot, sign) = bag.hash().slot(row + 5, column, 64)?;
                want[slot] += if row == 7 { 0.0 } else { f64::from(sign) };
            }
            assert_eq!(to_vec(grad)?, want);
            for (start, end) in [(3, 31), (9, 8), (31, 31)] {
                assert_eq!(
                    message(bag.to_table(start..end)),
                    format!("hashed-embedding-bag: rows must lie in 0..30, got {start}..{end}")
                );
            }
        }
        Ok(())
    })?;
    let cpu = &Device::Cpu;
    let weight = Tensor::zeros(64, DType::F32, cpu)?;
    let huge = HashedEmbeddingBag::new(weight, 1 << 62, 4, Default::default())?;
    assert!(message(huge.to_table(..)).contains("is too large"));
    assert_eq!(huge.to_table((1 << 61)..(1 << 61) + 2)?.dims(), [2, 4]);
    assert_eq!(huge.to_table(7..7)?.dims(), [0, 4]);
    Ok(())
}
