//! The archive that `torch.save` writes: a zip file with one pickle, `data.pkl`, that describes tensors, and the bytes of
//! each storage as a file beside it.
//!
//! candle's pickle machine ([`Stack`]) runs the opcodes. It trusts the file: it makes room for strings of any stated
//! length, copies objects whenever they are remembered or recalled (so that a few hundred bytes can ask for all memory),
//! and nests as deep as it is told (so that dropping the result can overflow the stack). [`unpickle`] steps it one opcode
//! at a time and stops before any of that. What candle makes of the finished object indexes argument lists of any length;
//! it is read here instead, into [`View`]s. No code of the file is run: a class is a name.

use candle_core::pickle::{Object, Stack};
use candle_core::{bail, DType, Device, Error, Result, Tensor};
use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::{BufReader, Read};
use std::sync::Mutex;
use zip::{CompressionMethod, ZipArchive};

/// The first bytes of every zip file.
pub(super) const MAGIC: &[u8] = b"PK\x03\x04";

/// A `.pth` file, opened: its pickle read, no tensor loaded yet.
#[derive(Debug)]
pub(super) struct Archive {
    zip: Mutex<Zip>,
    tensors: BTreeMap<String, std::result::Result<View, Unread>>,
}

type Zip = ZipArchive<BufReader<File>>;

/// Where a tensor lies in a storage. Two tensors of one view share their memory.
#[derive(Debug)]
struct View {
    /// The path of the storage in the archive.
    storage: String,
    /// The class of the storage, such as `FloatStorage`.
    class: String,
    /// In elements, as the strides.
    offset: usize,
    dims: Vec<usize>,
    strides: Vec<usize>,
}

/// The function that rebuilds a tensor of a kind that is not read, such as a sparse one.
#[derive(Debug)]
struct Unread(String);

impl Archive {
    /// Reads the state dict of a file, or what it holds under `key`.
    pub(super) fn open(file: File, key: Option<&str>) -> Result<Self> {
        let mut zip = ZipArchive::new(BufReader::new(file))?;
        let names = zip
            .file_names()
            .collect::<std::result::Result<Vec<_>, _>>()?;
        let pickles: Vec<_> = names
            .iter()
            .filter_map(|name| name.strip_suffix("data.pkl"))
            .filter(|root| root.is_empty() || root.ends_with('/'))
            .map(str::to_string)
            .collect();
        let [root] = pickles.as_slice() else {
            bail!(
                "import: a PyTorch archive holds one data.pkl, this zip file {}",
                pickles.len()
            );
        };
        drop(names);
        if read(&mut zip, &format!("{root}byteorder")).is_ok_and(|order| order == b"big") {
            bail!("import: the archive was written on a big-endian machine");
        }
        let mut object = unpickle(&read(&mut zip, &format!("{root}data.pkl"))?)?;
        if let Some(key) = key {
            let (_, value) = dict(object)?
                .into_iter()
                .find(|(name, _)| *name == Object::Unicode(key.to_string()))
                .ok_or_else(|| Error::msg(format!("import: the file holds no {key}")))?;
            object = value;
        }
        let (mut tensors, mut nested) = (BTreeMap::new(), vec![]);
        for (name, value) in dict(object)? {
            let Object::Unicode(name) = name else {
                continue;
            };
            match tensor(value, root)? {
                Value::Tensor(tensor) => {
                    let earlier = tensors.insert(name.clone(), tensor);
                    if earlier.is_some() {
                        bail!("import: {name} is there twice");
                    }
                }
                // PyTorch's own notes on the modules, not a state dict within the state dict.
                Value::Dict if name != "_metadata" => nested.push(name),
                _ => {}
            }
        }
        if tensors.is_empty() && !nested.is_empty() {
            bail!(
                "import: no tensors at the top; the state dict may be under {}",
                nested.join(" or ")
            );
        }
        Ok(Self {
            zip: Mutex::new(zip),
            tensors,
        })
    }
}

/// The entries of a dict.
fn dict(object: Object) -> Result<Vec<(Object, Object)>> {
    match object {
        Object::Dict(entries) => Ok(entries),
        _ => bail!("import: no dict in the pickle; save module.state_dict(), not the module"),
    }
}

/// A file of the archive, whole and with its checksum verified.
fn read(zip: &mut Zip, name: &str) -> Result<Vec<u8>> {
    let mut file = zip.by_name(name)?;
    // PyTorch never does; and what is compressed can be of any size.
    if file.compression() != CompressionMethod::Stored {
        bail!("import: {name} is compressed");
    }
    // Grows with what there is, not with what the archive says there is.
    let mut bytes = vec![];
    file.read_to_end(&mut bytes)?;
    Ok(bytes)
}

impl Archive {
    pub(super) fn entries(&self) -> BTreeMap<String, String> {
        let tensors = self.tensors.iter();
        tensors
            .map(|(key, tensor)| (key.clone(), format!("{tensor:?}")))
            .collect()
    }

    pub(super) fn load(&self, key: &str, device: &Device) -> Result<Tensor> {
        match self.tensors.get(key) {
            Some(Ok(view)) => {
                let bytes = {
                    let mut zip = self.zip.lock().unwrap_or_else(|e| e.into_inner());
                    read(&mut zip, &view.storage)?
                };
                view.load(&bytes, device)
            }
            Some(Err(Unread(function))) => bail!("a tensor made by {function}, which is not read"),
            None => bail!("missing"),
        }
    }
}

impl View {
    fn dtype(&self) -> Result<DType> {
        Ok(match self.class.as_str() {
            "FloatStorage" => DType::F32,
            "DoubleStorage" => DType::F64,
            "HalfStorage" => DType::F16,
            "BFloat16Storage" => DType::BF16,
            "LongStorage" => DType::I64,
            "IntStorage" => DType::I32,
            "ShortStorage" => DType::I16,
            "ByteStorage" => DType::U8,
            other => bail!("candle has no dtype for {other}"),
        })
    }

    /// The tensor, contiguous, from the bytes of its storage.
    fn load(&self, bytes: &[u8], device: &Device) -> Result<Tensor> {
        let dtype = self.dtype()?;
        let width = dtype.size_in_bytes();
        let stored = bytes.len() / width;
        // A dimension of zero does not excuse the others: their product is a stride.
        let dims = self.dims.iter().map(|&dim| dim.max(1));
        let count = dims
            .clone()
            .try_fold(1usize, |count, dim| count.checked_mul(dim));
        let last = dims
            .zip(&self.strides)
            .try_fold(self.offset, |last, (dim, &stride)| {
                last.checked_add((dim - 1).checked_mul(stride)?)
            });
        let (count, last) = match (count, last) {
            (Some(_), _) if self.dims.contains(&0) => {
                return Tensor::zeros(self.dims.as_slice(), dtype, device)
            }
            // A view that repeats values could be of any length.
            (Some(count), Some(last)) if count <= stored && last < stored => (count, last),
            _ => bail!(
                "shape {:?} with strides {:?} at {} does not fit a storage of {stored} values",
                self.dims,
                self.strides,
                self.offset
            ),
        };
        let load = |bytes: &[u8]| Tensor::from_raw_buffer(bytes, dtype, &self.dims, device);
        if last + 1 - self.offset == count && self.is_contiguous() {
            return load(&bytes[self.offset * width..(last + 1) * width]);
        }
        let mut gathered = Vec::with_capacity(count * width);
        let mut index = vec![0; self.dims.len()];
        for _ in 0..count {
            let steps = index
                .iter()
                .zip(&self.strides)
                .map(|(i, stride)| i * stride);
            let at = (self.offset + steps.sum::<usize>()) * width;
            gathered.extend_from_slice(&bytes[at..at + width]);
            for (i, &dim) in index.iter_mut().zip(&self.dims).rev() {
                *i += 1;
                if *i < dim {
                    break;
                }
                *i = 0;
            }
        }
        load(&gathered)
    }

    /// Whether the values lie in row-major order without gaps.
    fn is_contiguous(&self) -> bool {
        let mut expected = 1;
        self.dims
            .iter()
            .zip(&self.strides)
            .rev()
            .all(|(&dim, &stride)| {
                let fits = dim == 1 || stride == expected;
                expected *= dim;
                fits
            })
    }
}

/// What stands beside a key.
enum Value {
    Tensor(std::result::Result<View, Unread>),
    Dict,
    Other,
}

/// A tensor as `torch._utils` rebuilds it: `_rebuild_tensor_v2(storage, offset, size, stride, …)`, perhaps as an argument
/// of `_rebuild_parameter(tensor, …)` or `_rebuild_from_type_v2(function, type, arguments, …)`.
fn tensor(value: Object, root: &str) -> Result<Value> {
    let (callable, args) = match value {
        Object::Reduce { callable, args } => (*callable, *args),
        Object::Dict(_) => return Ok(Value::Dict),
        _ => return Ok(Value::Other),
    };
    let (Object::Class { class_name, .. }, Object::Tuple(args)) = (callable, args) else {
        return Ok(Value::Other);
    };
    let mut args = args.into_iter();
    let read = match class_name.as_str() {
        "_rebuild_tensor_v2" => view(args, root).map(|view| Ok(Value::Tensor(Ok(view)))),
        "_rebuild_parameter" => args.next().map(|data| tensor(data, root)),
        "_rebuild_from_type_v2" => match (args.next(), args.nth(1)) {
            (Some(callable), Some(args)) => {
                let (callable, args) = (Box::new(callable), Box::new(args));
                Some(tensor(Object::Reduce { callable, args }, root))
            }
            _ => None,
        },
        other if other.starts_with("_rebuild_") => Some(Ok(Value::Tensor(Err(Unread(class_name))))),
        _ => Some(Ok(Value::Other)),
    };
    read.unwrap_or_else(|| {
        bail!("import: a tensor of the pickle is not of the form that torch.save writes")
    })
}

/// The arguments of `_rebuild_tensor_v2`; a storage is `('storage', class, key, location, len)`.
fn view(mut args: impl Iterator<Item = Object>, root: &str) -> Option<View> {
    let (storage, offset) = (args.next()?, args.next()?);
    let (dims, strides) = (integers(args.next()?)?, integers(args.next()?)?);
    let mut id = storage.persistent_load().ok()?.tuple().ok()?.into_iter();
    let (_, class) = id.nth(1)?.class().ok()?;
    let key = id.next()?.unicode().ok()?;
    (dims.len() == strides.len()).then_some(View {
        storage: format!("{root}data/{key}"),
        class,
        offset: integer(offset)?,
        dims,
        strides,
    })
}

fn integer(object: Object) -> Option<usize> {
    usize::try_from(object.int_or_long().ok()?).ok()
}

fn integers(object: Object) -> Option<Vec<usize>> {
    object.tuple().ok()?.into_iter().map(integer).collect()
}

/// How deep objects of a pickle may nest: dropping one recurses. A state dict nests about ten deep, and one deeper for
/// each thousand entries, which are added in batches.
const MAX_DEPTH: usize = 1000;

/// How many bytes of copies a pickle may ask for by remembering and recalling objects: so many for each of its own bytes,
/// three times what state dicts of PyTorch ask for, and some to begin with.
const COPIED_PER_BYTE: usize = 100;
const COPIED_AT_LEAST: usize = 1 << 26;

/// How large and how deep an object on the machine's stack is.
#[derive(Clone, Copy, Default)]
struct Size {
    bytes: usize,
    depth: usize,
}

/// Runs a pickle on candle's machine, refusing what could take its memory or its stack.
fn unpickle(mut pickle: &[u8]) -> Result<Object> {
    let mut stack = Stack::empty();
    // The sizes of the objects on the stack, and of those remembered.
    let mut sizes: Vec<Size> = vec![];
    let mut memo: HashMap<u32, Size> = HashMap::new();
    let may_copy = COPIED_AT_LEAST.saturating_add(COPIED_PER_BYTE.saturating_mul(pickle.len()));
    let mut copied = 0usize;
    loop {
        let Some((&op, operand)) = pickle.split_first() else {
            bail!("import: the pickle ends early");
        };
        let word = || {
            operand
                .first_chunk()
                .map(|bytes| u32::from_le_bytes(*bytes))
        };
        let byte = || operand.first().map(|&byte| byte.into());
        // The slot of the memo that is written or read.
        let (put, get) = match op {
            b'q' => (byte(), None),
            b'r' => (word(), None),
            b'h' => (None, byte()),
            b'j' => (None, word()),
            // A string, by its length; candle makes room before it reads.
            b'X' if word().is_some_and(|len| len as usize > operand.len()) => {
                bail!("import: the pickle ends within a string")
            }
            // An integer, by its number of bytes; candle shifts by eight bits for each.
            0x8a if byte().is_some_and(|len: u32| len > 8) => {
                bail!("import: the pickle holds an integer of more than 64 bits")
            }
            _ => (None, None),
        };
        let copy = match (put, get) {
            (Some(_), _) => sizes.last().copied(),
            (_, Some(slot)) => memo.get(&slot).copied(),
            _ => None,
        };
        copied = copied.saturating_add(copy.unwrap_or_default().bytes);
        if copied > may_copy {
            bail!("import: the pickle asks for more than {may_copy} bytes of copies");
        }
        let before = pickle.len();
        // Its messages may quote the whole stack.
        let done = stack.read(&mut pickle).map_err(|e| {
            let message: String = e.to_string().chars().take(100).collect();
            Error::msg(format!(
                "import: the pickle is not one of a state dict: {message}"
            ))
        })?;
        if done {
            return stack.finalize();
        }
        let Some(top) = stack.stack().len().checked_sub(1) else {
            sizes.clear();
            continue;
        };
        if let (Some(slot), Some(size)) = (put, copy) {
            memo.insert(slot, size);
        } else if let (Some(_), Some(size)) = (get, copy) {
            sizes.push(size);
        } else {
            // What was on top is now within the new top.
            let within = sizes.split_off(top.min(sizes.len()));
            let depth = within.iter().map(|size| size.depth).max().unwrap_or(0) + 1;
            if depth > MAX_DEPTH {
                bail!("import: the pickle nests deeper than {MAX_DEPTH}");
            }
            let own = size_of::<Object>() + (before - pickle.len());
            let bytes = within
                .iter()
                .fold(own, |sum, size| sum.saturating_add(size.bytes));
            sizes.push(Size { bytes, depth });
        }
    }
}
