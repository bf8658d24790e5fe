//! The archive that `torch.save` writes: a zip file with one pickle, `data.pkl`, which describes the tensors, and a file for the
//! bytes of each storage.
//!
//! The archive is mapped. Only storages whose tensors are asked for are read: once as a whole, to verify the checksum, and then
//! the parts that hold the tensors.

use super::pickle::{Id, Pickle, Value};
use crate::checkpoint::file::{self, TensorInfo};
use candle_core::{bail, Device, Error, Result, Tensor};
use memmap2::Mmap;
use safetensors::Dtype;
use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::io::Cursor;
use std::ops::Range;
use std::sync::{Arc, Mutex};
use zip::{CompressionMethod, ZipArchive};

/// The first bytes of every zip file.
pub(super) const MAGIC: &[u8] = b"PK\x03\x04";

/// An open `.pth` file: its pickle has been read, but no tensor.
#[derive(Debug)]
pub(super) struct Archive {
    map: Arc<Mmap>,
    /// The paths of the storages in the archive.
    storages: Vec<String>,
    tensors: BTreeMap<String, Entry>,
    files: Mutex<Files>,
}

/// A tensor, or the reason why it cannot be read.
type Entry = std::result::Result<View, String>;

/// The part of a storage that is a tensor.
#[derive(Debug, PartialEq)]
struct View {
    /// Its number in [`Archive::storages`].
    storage: usize,
    /// The dtype, or the name of one that not even safetensors has.
    dtype: std::result::Result<Dtype, String>,
    /// In elements, like the strides.
    offset: usize,
    dims: Arc<[usize]>,
    strides: Arc<[usize]>,
}

impl Archive {
    /// Reads the state dict of a file, or the one under `key`.
    pub(super) fn open(map: Mmap, key: Option<&str>) -> Result<Self> {
        let map = Arc::new(map);
        let mut files = Files::open(&map)?;
        let root = files.root()?;
        let is_big = files.locate(&format!("{root}byteorder"));
        if is_big.is_ok_and(|range| &map[range] == b"big") {
            bail!("the archive was written on a big-endian machine");
        }
        let path = format!("{root}data.pkl");
        let pickle = files.locate(&path)?;
        let pickle = Pickle::read(&map[pickle]).map_err(|e| Error::msg(format!("{path}: {e}")))?;
        let state_dict = match key {
            None => pickle.root(),
            Some(key) => find(&pickle, key)?,
        };
        let (tensors, keys) = tensors(&pickle, state_dict)?;
        if tensors.is_empty() {
            let below = state_dicts(&pickle, state_dict, key.unwrap_or_default());
            if !below.is_empty() {
                bail!(
                    "no tensors {}; the state dict may be under {}: open it with that key",
                    key.map_or("at the top".to_string(), |key| format!("under {key}")),
                    below.join(" or ")
                );
            }
        }
        let storages = keys.into_iter().map(|key| format!("{root}data/{key}"));
        Ok(Self {
            storages: storages.collect(),
            tensors,
            files: Mutex::new(files),
            map,
        })
    }

    pub(super) fn keys(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    pub(super) fn is_same(&self, a: &str, b: &str) -> bool {
        match (self.tensors.get(a), self.tensors.get(b)) {
            (Some(Ok(a)), Some(Ok(b))) => a == b,
            _ => a == b,
        }
    }

    pub(super) fn info(&self, key: &str) -> Result<TensorInfo> {
        let view = self.view(key)?;
        Ok(match &view.dtype {
            Ok(dtype) => TensorInfo::new(*dtype, &view.dims),
            Err(name) => TensorInfo::unknown(name, &view.dims),
        })
    }

    pub(super) fn load(&self, key: &str, device: &Device) -> Result<Tensor> {
        let view = self.view(key)?;
        let path = &self.storages[view.storage];
        let storage = {
            let mut files = self.files.lock().unwrap_or_else(|e| e.into_inner());
            files.locate(path)?
        };
        view.load(&self.map[storage], device)
    }

    fn view(&self, key: &str) -> Result<&View> {
        match self.tensors.get(key) {
            Some(Ok(view)) => Ok(view),
            Some(Err(reason)) => bail!("{reason}"),
            None => bail!("missing"),
        }
    }
}

// ---- the files of the archive ----

/// The files of the archive, located and verified on demand.
#[derive(Debug)]
struct Files {
    zip: ZipArchive<Cursor<Bytes>>,
    /// The length of the archive.
    len: usize,
    /// The files located so far: the range of their bytes, or what is wrong with them.
    located: HashMap<String, std::result::Result<Range<usize>, String>>,
}

/// The mapped archive, as the zip reader holds it.
#[derive(Debug, Clone)]
struct Bytes(Arc<Mmap>);

impl AsRef<[u8]> for Bytes {
    fn as_ref(&self) -> &[u8] {
        &self.0
    }
}

impl Files {
    fn open(map: &Arc<Mmap>) -> Result<Self> {
        let mut zip = ZipArchive::new(Cursor::new(Bytes(map.clone())))?;
        // Without overlaps, all files together are no longer than the archive, so verifying them takes no longer than reading it.
        if zip.has_overlapping_files()? {
            bail!("files of the archive overlap");
        }
        Ok(Self {
            zip,
            len: map.len(),
            located: HashMap::new(),
        })
    }

    /// The folder that holds the one pickle.
    fn root(&self) -> Result<String> {
        let names = self.zip.file_names();
        let names = names.collect::<std::result::Result<Vec<_>, _>>()?;
        let roots: Vec<_> = names
            .iter()
            .filter_map(|name| name.strip_suffix("data.pkl"))
            .filter(|root| root.is_empty() || root.ends_with('/'))
            .collect();
        match roots.as_slice() {
            [root] => Ok(root.to_string()),
            roots => bail!(
                "a PyTorch archive holds one data.pkl, this zip file {}",
                roots.len()
            ),
        }
    }

    /// The range of a file's bytes in the archive, once its checksum is verified.
    fn locate(&mut self, name: &str) -> Result<Range<usize>> {
        if let Some(located) = self.located.get(name) {
            return located.clone().map_err(Error::msg);
        }
        let located = self.verify(name).map_err(|e| format!("{name}: {e}"));
        self.located.insert(name.to_string(), located.clone());
        located.map_err(Error::msg)
    }

    fn verify(&mut self, name: &str) -> Result<Range<usize>> {
        let mut file = self.zip.by_name(name)?;
        // PyTorch never compresses, and compressed files could expand to any size.
        if file.compression() != CompressionMethod::Stored {
            bail!("is compressed");
        }
        let read = std::io::copy(&mut file, &mut std::io::sink())?;
        let start = file.data_start().and_then(|start| start.try_into().ok());
        let end = start.and_then(|start: usize| start.checked_add(read.try_into().ok()?));
        match (start, end) {
            (Some(start), Some(end)) if end <= self.len => Ok(start..end),
            _ => bail!("lies outside the archive"),
        }
    }
}

// ---- what the pickle holds ----

/// The contents of a dict, list or tuple, by key or position. Only keys that are text or numbers count.
fn children<'a: 'p, 'p>(
    pickle: &'p Pickle<'a>,
    id: Id,
) -> impl Iterator<Item = (Cow<'a, str>, Id)> + 'p {
    let items: &[Id] = match pickle.get(id) {
        Value::List(items) => items,
        _ => pickle.tuple(id).unwrap_or_default(),
    };
    let items = items.iter().enumerate();
    let items = items.map(|(i, &item)| (Cow::Owned(i.to_string()), item));
    let entries = pickle.dict(id).unwrap_or_default().iter();
    let entries = entries.filter_map(|&(key, value)| {
        let key = match pickle.get(key) {
            Value::Str(key) => Cow::Borrowed(*key),
            Value::Int(key) => Cow::Owned(key.to_string()),
            _ => return None,
        };
        Some((key, value))
    });
    items.chain(entries)
}

/// Finds the value under a key, whose parts are separated by dots. Keys may contain dots themselves: the longest match wins.
fn find(pickle: &Pickle, key: &str) -> Result<Id> {
    let (mut at, mut rest) = (pickle.root(), Some(key));
    while let Some(key_here) = rest {
        let fitting = children(pickle, at).filter_map(|(name, id)| {
            let rest = key_here.strip_prefix(&*name)?;
            let rest = match rest {
                "" => None,
                rest => Some(rest.strip_prefix('.')?),
            };
            Some((name.len(), id, rest))
        });
        let Some((_, id, after)) = fitting.max_by_key(|&(len, ..)| len) else {
            let known = state_dicts(pickle, pickle.root(), "");
            if known.is_empty() {
                bail!("the file holds no {key}, nor any other state dict");
            }
            bail!(
                "the file holds no {key}; the state dict may be under {}",
                known.join(" or ")
            );
        };
        (at, rest) = (id, after);
    }
    Ok(at)
}

/// How many state dicts a message names at most, and how long their keys may be.
const MAX_NAMED: usize = 8;
const MAX_NAME: usize = 200;

/// The keys of the dicts at or under a value that hold tensors, the least nested first. `key` is the key of the value itself.
fn state_dicts(pickle: &Pickle, id: Id, key: &str) -> Vec<String> {
    let mut seen = vec![false; pickle.len()];
    let mut found = vec![];
    // Each with the index in `visited` of the container that holds it, and its position there.
    let mut visited: Vec<(Id, Option<(u32, u32)>)> = vec![(id, None)];
    let mut at = 0;
    while at < visited.len() && found.len() < MAX_NAMED {
        let (id, _) = visited[at];
        let is_dict = pickle.dict(id).is_some();
        if is_dict && children(pickle, id).any(|(_, child)| tensor_call(pickle, child).is_some()) {
            let (mut names, mut here) = (vec![], at);
            while let Some((holder, position)) = visited[here].1 {
                here = holder as usize;
                let (holder, _) = visited[here];
                let child = children(pickle, holder).nth(position as usize);
                names.extend(child.map(|(name, _)| name));
            }
            names.extend(Some(Cow::Borrowed(key)).filter(|key| !key.is_empty()));
            names.reverse();
            if names.iter().map(|name| name.len() + 1).sum::<usize>() <= MAX_NAME {
                found.push(names.join("."));
            }
        } else {
            for (position, (_, child)) in children(pickle, id).enumerate() {
                if pickle.is_container(child) && !std::mem::replace(&mut seen[child.index()], true)
                {
                    visited.push((child, Some((at as u32, position as u32))));
                }
            }
        }
        at += 1;
    }
    found
}

/// The tensors of a state dict, and the keys of their storages.
fn tensors<'a>(pickle: &Pickle<'a>, id: Id) -> Result<(BTreeMap<String, Entry>, Vec<&'a str>)> {
    if pickle.dict(id).is_none() {
        bail!(
            "{} where a state dict should be; save module.state_dict(), not the module",
            describe(pickle, id)
        );
    }
    let (mut tensors, mut shared) = (BTreeMap::new(), Shared::default());
    for (name, value) in children(pickle, id) {
        let Some(entry) = entry(pickle, value, &mut shared) else {
            continue;
        };
        if tensors.contains_key(&*name) {
            bail!("{name} is there twice");
        }
        tensors.insert(name.into_owned(), entry);
    }
    Ok((tensors, shared.storages))
}

/// Describes a value in a message.
fn describe(pickle: &Pickle, id: Id) -> String {
    if tensor_call(pickle, id).is_some() {
        return "a tensor".to_string();
    }
    match pickle.get(id) {
        Value::List(_) => "a list".to_string(),
        Value::Tuple(..) => "a tuple".to_string(),
        Value::Str(_) => "text".to_string(),
        Value::Int(_) => "a number".to_string(),
        Value::Call { callable, .. } => match pickle.global(*callable) {
            Some((module, name)) => {
                format!("an object of {}.{}", shortened(module), shortened(name))
            }
            None => "an object".to_string(),
        },
        _ => "a value".to_string(),
    }
}

/// The beginning of a name. A pickle may use names of any length, any number of times.
fn shortened(name: &str) -> String {
    name.chars().take(64).collect()
}

/// What tensors share, stored once.
#[derive(Default)]
struct Shared<'a> {
    /// The keys of the storages, and the number of each.
    storages: Vec<&'a str>,
    numbers: HashMap<&'a str, usize>,
    /// Shapes and strides, by their tuple in the pickle.
    shapes: HashMap<Id, Arc<[usize]>>,
}

impl<'a> Shared<'a> {
    fn storage(&mut self, key: &'a str) -> usize {
        *self.numbers.entry(key).or_insert_with(|| {
            self.storages.push(key);
            self.storages.len() - 1
        })
    }

    fn shape(&mut self, pickle: &Pickle, id: Id) -> Option<Arc<[usize]>> {
        if let Some(shape) = self.shapes.get(&id) {
            return Some(shape.clone());
        }
        // PyTorch's own tensors have at most 64 dimensions.
        let items = pickle.tuple(id).filter(|items| items.len() <= 64)?;
        let shape: Arc<[usize]> = (items.iter())
            .map(|&item| integer(pickle, item))
            .collect::<Option<_>>()?;
        self.shapes.insert(id, shape.clone());
        Some(shape)
    }
}

/// The function that rebuilds a tensor, and its arguments. For a wrapped tensor, such as a parameter, those of the inner tensor.
/// `None` if the value is not a tensor.
fn tensor_call<'a, 'p>(pickle: &'p Pickle<'a>, id: Id) -> Option<(&'a str, &'p [Id])> {
    let (callable, mut args) = pickle.call(id)?;
    let (_, mut function) = pickle.global(callable)?;
    // PyTorch wraps a tensor once or twice.
    for _ in 0..4 {
        let inner = match function {
            "_rebuild_parameter"
            | "_rebuild_parameter_with_state"
            | "_rebuild_device_tensor_from_cpu_tensor" => {
                args.first().and_then(|&data| pickle.call(data))
            }
            // The function, the type of the result, the arguments.
            "_rebuild_from_type" | "_rebuild_from_type_v2" => match args {
                &[function, _, args, ..] => pickle.tuple(args).map(|args| (function, args)),
                _ => None,
            },
            _ => None,
        };
        let Some((callable, inner_args)) = inner else {
            break;
        };
        let Some((_, inner_function)) = pickle.global(callable) else {
            break;
        };
        (function, args) = (inner_function, inner_args);
    }
    function
        .starts_with("_rebuild_")
        .then_some((function, args))
}

/// The tensor that a value stands for, or the reason why it cannot be read. `None` if the value is not a tensor.
fn entry<'a>(pickle: &Pickle<'a>, id: Id, shared: &mut Shared<'a>) -> Option<Entry> {
    let (function, args) = tensor_call(pickle, id)?;
    let attributes = match function {
        "_rebuild_tensor" => None,
        // Storage, offset, size and stride are followed by requires_grad and hooks, in a quantized tensor after its parameters.
        "_rebuild_tensor_v2" => args.get(6),
        "_rebuild_tensor_v3" => args.get(7),
        "_rebuild_qtensor" => None,
        other => {
            let other = shortened(other);
            return Some(Err(format!("a tensor made by {other}, which is not read")));
        }
    };
    // PyTorch's marks on complex and negated views, whose values are not those in the storage.
    let is_plain = attributes.is_none_or(|&attributes| {
        let attributes = pickle.dict(attributes);
        attributes.is_none_or(|attributes| attributes.is_empty())
    });
    if !is_plain {
        let reason = "a view that conjugates or negates; save its resolve_conj().resolve_neg()";
        return Some(Err(reason.to_string()));
    }
    let dtype = match function {
        "_rebuild_tensor_v3" => args.get(6).copied(),
        _ => None,
    };
    let view = view(pickle, args, dtype, shared);
    Some(view.ok_or_else(|| "not of the form that torch.save writes".to_string()))
}

/// Reads the first arguments of the functions that rebuild tensors: storage, offset, size and stride. A storage is `('storage',
/// class, key, location, len)`; its class implies the dtype unless `dtype` is given.
fn view<'a>(
    pickle: &Pickle<'a>,
    args: &[Id],
    dtype: Option<Id>,
    shared: &mut Shared<'a>,
) -> Option<View> {
    let &[storage, offset, dims, strides, ..] = args else {
        return None;
    };
    let Value::Persistent(storage) = pickle.get(storage) else {
        return None;
    };
    let &[_, class, key, ..] = pickle.tuple(*storage)? else {
        return None;
    };
    let (_, class) = pickle.global(class)?;
    let dtype = match dtype {
        None => class.strip_suffix("Storage")?,
        Some(dtype) => pickle.global(dtype)?.1,
    };
    let key = pickle.str(key).filter(|key| key.len() <= 64)?;
    let (dims, strides) = (shared.shape(pickle, dims)?, shared.shape(pickle, strides)?);
    (dims.len() == strides.len()).then_some(View {
        dtype: dtype_of(dtype),
        offset: integer(pickle, offset)?,
        dims,
        strides,
        storage: shared.storage(key),
    })
}

fn integer(pickle: &Pickle, id: Id) -> Option<usize> {
    usize::try_from(pickle.int(id)?).ok()
}

/// The dtype of a storage class without its `Storage`, or of a `torch.dtype`.
fn dtype_of(name: &str) -> std::result::Result<Dtype, String> {
    Ok(match name {
        "Float" | "float32" => Dtype::F32,
        "Double" | "float64" => Dtype::F64,
        "Half" | "float16" => Dtype::F16,
        "BFloat16" | "bfloat16" => Dtype::BF16,
        "Long" | "int64" => Dtype::I64,
        "Int" | "int32" => Dtype::I32,
        "Short" | "int16" => Dtype::I16,
        "Char" | "int8" => Dtype::I8,
        "Byte" | "uint8" => Dtype::U8,
        "Bool" | "bool" => Dtype::BOOL,
        "ComplexFloat" | "complex64" => Dtype::C64,
        "uint16" => Dtype::U16,
        "uint32" => Dtype::U32,
        "uint64" => Dtype::U64,
        "float8_e4m3fn" => Dtype::F8_E4M3,
        "float8_e5m2" => Dtype::F8_E5M2,
        "float8_e4m3fnuz" => Dtype::F8_E4M3FNUZ,
        "float8_e5m2fnuz" => Dtype::F8_E5M2FNUZ,
        "float8_e8m0fnu" => Dtype::F8_E8M0,
        "ComplexDouble" | "complex128" => return Err("c128".to_string()),
        other => return Err(shortened(other).to_lowercase()),
    })
}

// ---- values ----

impl View {
    /// Makes the tensor, contiguous, from the bytes of its storage.
    fn load(&self, storage: &[u8], device: &Device) -> Result<Tensor> {
        let dtype = match &self.dtype {
            Ok(dtype) => *dtype,
            Err(name) => bail!("{}", file::no_dtype(name)),
        };
        // Every dtype of `dtype_of` has whole bytes.
        let width = dtype.bitsize() / 8;
        let stored = storage.len() / width;
        // Dimensions of zero count as one, because the product of the others must not overflow either: it is a stride.
        let dims = self.dims.iter().map(|&dim| dim.max(1));
        let count = dims
            .clone()
            .try_fold(1usize, |count, dim| count.checked_mul(dim));
        let last = dims
            .zip(self.strides.iter())
            .try_fold(self.offset, |last, (dim, &stride)| {
                last.checked_add((dim - 1).checked_mul(stride)?)
            });
        let load = |values: &[u8]| file::tensor(dtype, &self.dims, values, device);
        let (count, last) = match (count, last) {
            (Some(_), _) if self.dims.contains(&0) => return load(&[]),
            // A view that repeats values could have any length, so its elements must not outnumber those stored.
            (Some(count), Some(last)) if count <= stored && last < stored => (count, last),
            _ => bail!(
                "shape {:?} with strides {:?} at {} does not fit a storage of {stored} values",
                self.dims,
                self.strides,
                self.offset
            ),
        };
        if last + 1 - self.offset == count && self.is_contiguous() {
            return load(&storage[self.offset * width..(last + 1) * width]);
        }
        let mut gathered = Vec::with_capacity(count * width);
        let mut index = vec![0; self.dims.len()];
        for _ in 0..count {
            let steps = index
                .iter()
                .zip(self.strides.iter())
                .map(|(i, stride)| i * stride);
            let at = (self.offset + steps.sum::<usize>()) * width;
            gathered.extend_from_slice(&storage[at..at + width]);
            for (i, &dim) in index.iter_mut().zip(self.dims.iter()).rev() {
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
            .zip(self.strides.iter())
            .rev()
            .all(|(&dim, &stride)| {
                let fits = dim == 1 || stride == expected;
                expected *= dim;
                fits
            })
    }
}
