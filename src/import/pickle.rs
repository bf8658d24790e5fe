//! Python's pickle format, read as data.
//!
//! A pickle is a program for a machine with a stack, and a memo of objects that are used again. This machine runs it without
//! side effects: where Python would import a class and call it, only its name and arguments are recorded. Whoever reads the
//! [`Pickle`] decides what they mean.
//!
//! | what a pickle may do | what keeps it harmless |
//! |---|---|
//! | use an object in many places, or within itself | values are kept in one list and refer to each other by number: each use copies four bytes |
//! | nest without limit | reading and dropping do not recurse |
//! | claim lengths that it does not have | text and bytes are slices of the pickle and are never allocated |
//! | create objects with single bytes | at most [`MAX_PUSHES`] values are pushed on the stack |
//!
//! Protocols 2 to 5 are read, as Python 3 writes them; registered extensions and out-of-band buffers are refused.

use candle_core::{bail, Result};
use std::collections::HashMap;

/// The position of a value in its pickle.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(super) struct Id(u32);

impl Id {
    pub(super) fn index(self) -> usize {
        self.0 as usize
    }
}

/// A value. Values that a state dict has no use for are [`Other`](Self::Other).
#[derive(Debug)]
pub(super) enum Value<'a> {
    Int(i64),
    Str(&'a str),
    /// The module and the name of a class or function, both [`Str`](Self::Str).
    Global(Id, Id),
    /// The start and the end of its items in [`Pickle::items`].
    Tuple(u32, u32),
    List(Vec<Id>),
    Dict(Vec<(Id, Id)>),
    /// The result of calling a class or function, and the entries that were set on it afterwards.
    Call {
        callable: Id,
        args: Id,
        entries: Vec<(Id, Id)>,
    },
    /// A reference to an object outside the pickle, such as a storage.
    Persistent(Id),
    /// `None`, booleans, floats, bytes, sets, integers of more than 64 bits, and text that is not UTF-8.
    Other,
}

/// A limit for pickles of many tiny objects: each push takes some forty bytes of memory. PyTorch needs about twenty per tensor.
const MAX_PUSHES: usize = 1 << 24;

/// A pickle, read.
#[derive(Debug)]
pub(super) struct Pickle<'a> {
    values: Vec<Value<'a>>,
    /// The items of all tuples.
    items: Vec<Id>,
    root: Id,
}

impl<'a> Pickle<'a> {
    /// Reads a pickle up to its end mark.
    pub(super) fn read(bytes: &'a [u8]) -> Result<Self> {
        Machine {
            input: bytes,
            values: vec![],
            items: vec![],
            pushes: 0,
            stack: vec![],
            marks: vec![],
            memo: HashMap::new(),
        }
        .run()
    }

    /// The pickled object.
    pub(super) fn root(&self) -> Id {
        self.root
    }

    pub(super) fn len(&self) -> usize {
        self.values.len()
    }

    pub(super) fn get(&self, id: Id) -> &Value<'a> {
        &self.values[id.index()]
    }

    /// Whether a value may hold others.
    pub(super) fn is_container(&self, id: Id) -> bool {
        let is_sequence = matches!(self.get(id), Value::Tuple(..) | Value::List(_));
        is_sequence || self.dict(id).is_some()
    }

    pub(super) fn str(&self, id: Id) -> Option<&'a str> {
        match self.get(id) {
            Value::Str(text) => Some(text),
            _ => None,
        }
    }

    pub(super) fn int(&self, id: Id) -> Option<i64> {
        match self.get(id) {
            Value::Int(n) => Some(*n),
            _ => None,
        }
    }

    pub(super) fn tuple(&self, id: Id) -> Option<&[Id]> {
        match self.get(id) {
            &Value::Tuple(first, end) => Some(&self.items[first as usize..end as usize]),
            _ => None,
        }
    }

    /// The module and the name of a class or function.
    pub(super) fn global(&self, id: Id) -> Option<(&'a str, &'a str)> {
        match self.get(id) {
            Value::Global(module, name) => Some((self.str(*module)?, self.str(*name)?)),
            _ => None,
        }
    }

    /// The function and the arguments of a call.
    pub(super) fn call(&self, id: Id) -> Option<(Id, &[Id])> {
        match self.get(id) {
            Value::Call { callable, args, .. } => Some((*callable, self.tuple(*args)?)),
            _ => None,
        }
    }

    /// The entries of a dict, or of an object that acts as one: an `OrderedDict`, or any other object on which entries were set.
    pub(super) fn dict(&self, id: Id) -> Option<&[(Id, Id)]> {
        match self.get(id) {
            Value::Dict(entries) => Some(entries),
            Value::Call {
                callable, entries, ..
            } => {
                let is_dict = !entries.is_empty()
                    || matches!(
                        self.global(*callable),
                        Some(("collections", "OrderedDict" | "defaultdict"))
                    );
                is_dict.then_some(entries)
            }
            _ => None,
        }
    }
}

struct Machine<'a> {
    /// The rest of the pickle, not read yet.
    input: &'a [u8],
    values: Vec<Value<'a>>,
    items: Vec<Id>,
    /// How many values have been pushed on the stack.
    pushes: usize,
    stack: Vec<Id>,
    /// The heights of the stack at which marks were set.
    marks: Vec<usize>,
    memo: HashMap<u32, Id>,
}

impl<'a> Machine<'a> {
    fn run(mut self) -> Result<Pickle<'a>> {
        loop {
            match self.byte()? {
                // The protocol; a frame, which only matters when reading from a stream.
                0x80 => match self.byte()? {
                    2..=5 => {}
                    other => bail!("pickle protocol {other}, only 2 to 5 are read"),
                },
                0x95 => drop(self.take(8)?),
                b'.' => {
                    let root = self.pop()?;
                    return Ok(Pickle {
                        values: self.values,
                        items: self.items,
                        root,
                    });
                }

                // The stack.
                b'(' => {
                    self.count()?;
                    self.marks.push(self.stack.len());
                }
                b'0' if self.marks.last() == Some(&self.stack.len()) => drop(self.marks.pop()),
                b'0' => drop(self.pop()?),
                b'1' => drop(self.pop_to_mark()?),
                b'2' => {
                    let top = self.top()?;
                    self.push_again(top)?;
                }

                // The memo.
                b'q' => {
                    let slot = self.byte()?.into();
                    self.remember(slot)?;
                }
                b'r' => {
                    let slot = u32::from_le_bytes(self.array()?);
                    self.remember(slot)?;
                }
                0x94 => self.remember(self.memo.len() as u32)?,
                b'h' => {
                    let slot = self.byte()?.into();
                    self.recall(slot)?;
                }
                b'j' => {
                    let slot = u32::from_le_bytes(self.array()?);
                    self.recall(slot)?;
                }

                // Scalars.
                b'N' | 0x88 | 0x89 => self.push(Value::Other)?,
                b'G' => {
                    self.take(8)?;
                    self.push(Value::Other)?;
                }
                b'J' => {
                    let n = i32::from_le_bytes(self.array()?);
                    self.push(Value::Int(n.into()))?;
                }
                b'K' => {
                    let n = self.byte()?;
                    self.push(Value::Int(n.into()))?;
                }
                b'M' => {
                    let n = u16::from_le_bytes(self.array()?);
                    self.push(Value::Int(n.into()))?;
                }
                0x8a => {
                    let len = self.byte()?;
                    self.long(len.into())?;
                }
                0x8b => {
                    let len = u32::from_le_bytes(self.array()?);
                    self.long(len.into())?;
                }

                // Text and bytes.
                0x8c => {
                    let len = self.byte()?;
                    self.text(len.into())?;
                }
                b'X' => {
                    let len = u32::from_le_bytes(self.array()?);
                    self.text(len.into())?;
                }
                0x8d => {
                    let len = u64::from_le_bytes(self.array()?);
                    self.text(len)?;
                }
                b'C' => {
                    let len = self.byte()?;
                    self.bytes(len.into())?;
                }
                b'B' => {
                    let len = u32::from_le_bytes(self.array()?);
                    self.bytes(len.into())?;
                }
                0x8e | 0x96 => {
                    let len = u64::from_le_bytes(self.array()?);
                    self.bytes(len)?;
                }

                // Tuples.
                b')' => self.tuple(0)?,
                0x85 => self.tuple(1)?,
                0x86 => self.tuple(2)?,
                0x87 => self.tuple(3)?,
                b't' => {
                    let bottom = self.pop_mark()?;
                    self.tuple(self.stack.len() - bottom)?;
                }

                // Lists. Items appended to other objects, such as a deque, are passed over.
                b']' => self.push(Value::List(vec![]))?,
                b'a' => {
                    let item = self.pop()?;
                    self.append(vec![item])?;
                }
                b'e' => {
                    let items = self.pop_to_mark()?;
                    self.append(items)?;
                }

                // Dicts.
                b'}' => self.push(Value::Dict(vec![]))?,
                b's' => {
                    let value = self.pop()?;
                    let key = self.pop()?;
                    self.set(vec![key, value])?;
                }
                b'u' => {
                    let items = self.pop_to_mark()?;
                    self.set(items)?;
                }

                // Sets.
                0x8f => self.push(Value::Other)?,
                0x90 => {
                    self.pop_to_mark()?;
                    self.top()?;
                }
                0x91 => {
                    self.pop_to_mark()?;
                    self.push(Value::Other)?;
                }

                // Classes and functions, and the objects that calling them returns.
                b'c' => {
                    let (module, name) = (self.line()?, self.line()?);
                    self.push(text_or_other(module))?;
                    self.push(text_or_other(name))?;
                    self.global()?;
                }
                0x93 => self.global()?,
                b'R' | 0x81 => {
                    let args = self.pop()?;
                    let callable = self.pop()?;
                    self.call(callable, args)?;
                }
                0x92 => {
                    self.pop()?; // keyword arguments
                    let args = self.pop()?;
                    let callable = self.pop()?;
                    self.call(callable, args)?;
                }
                // The attributes of an object, as opposed to its entries, are not needed.
                b'b' => {
                    self.pop()?;
                    self.top()?;
                }
                b'Q' => {
                    let id = self.pop()?;
                    self.push(Value::Persistent(id))?;
                }

                other => {
                    bail!("opcode {other:#04x} is not one that Python 3 writes for a state dict")
                }
            }
        }
    }

    // ---- input ----

    fn take(&mut self, len: u64) -> Result<&'a [u8]> {
        let len = usize::try_from(len).ok();
        match len.and_then(|len| self.input.split_at_checked(len)) {
            Some((taken, rest)) => {
                self.input = rest;
                Ok(taken)
            }
            None => bail!("the pickle ends early"),
        }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N]> {
        match self.input.split_first_chunk() {
            Some((taken, rest)) => {
                self.input = rest;
                Ok(*taken)
            }
            None => bail!("the pickle ends early"),
        }
    }

    fn byte(&mut self) -> Result<u8> {
        let [byte] = self.array()?;
        Ok(byte)
    }

    /// The bytes up to the end of a line, which is consumed too.
    fn line(&mut self) -> Result<&'a [u8]> {
        let Some(len) = self.input.iter().position(|&byte| byte == b'\n') else {
            bail!("the pickle ends early");
        };
        let line = self.take(len as u64)?;
        self.byte()?;
        Ok(line)
    }

    // ---- stack and memo ----

    fn push(&mut self, value: Value<'a>) -> Result<()> {
        self.values.push(value);
        self.push_again(Id(self.values.len() as u32 - 1))
    }

    fn push_again(&mut self, id: Id) -> Result<()> {
        self.count()?;
        self.stack.push(id);
        Ok(())
    }

    fn count(&mut self) -> Result<()> {
        self.pushes += 1;
        if self.pushes > MAX_PUSHES {
            bail!("the pickle uses more than {MAX_PUSHES} values");
        }
        Ok(())
    }

    /// The topmost value, which must be above the last mark.
    fn top(&self) -> Result<Id> {
        let bottom = self.marks.last().copied().unwrap_or(0);
        match self.stack[bottom..].last() {
            Some(&id) => Ok(id),
            None => bail!("the pickle takes a value that is not there"),
        }
    }

    fn pop(&mut self) -> Result<Id> {
        let top = self.top()?;
        self.stack.pop();
        Ok(top)
    }

    /// Removes the last mark and returns the height of the stack at which it was set; the values above belong to it.
    fn pop_mark(&mut self) -> Result<usize> {
        match self.marks.pop() {
            Some(bottom) => Ok(bottom),
            None => bail!("the pickle takes values up to a mark that is not there"),
        }
    }

    fn pop_to_mark(&mut self) -> Result<Vec<Id>> {
        let bottom = self.pop_mark()?;
        Ok(self.stack.split_off(bottom))
    }

    fn remember(&mut self, slot: u32) -> Result<()> {
        let top = self.top()?;
        self.memo.insert(slot, top);
        Ok(())
    }

    fn recall(&mut self, slot: u32) -> Result<()> {
        match self.memo.get(&slot) {
            Some(&id) => self.push_again(id),
            None => bail!("the pickle recalls an object {slot} that it has not stored"),
        }
    }

    // ---- values ----

    /// A signed integer of `len` bytes.
    fn long(&mut self, len: u64) -> Result<()> {
        let bytes = self.take(len)?;
        let value = match bytes.last() {
            None => Value::Int(0),
            Some(&last) if bytes.len() <= 8 => {
                let sign = if last < 0x80 { 0 } else { 0xff };
                let mut extended = [sign; 8];
                extended[..bytes.len()].copy_from_slice(bytes);
                Value::Int(i64::from_le_bytes(extended))
            }
            Some(_) => Value::Other,
        };
        self.push(value)
    }

    fn text(&mut self, len: u64) -> Result<()> {
        let bytes = self.take(len)?;
        self.push(text_or_other(bytes))
    }

    fn bytes(&mut self, len: u64) -> Result<()> {
        self.take(len)?;
        self.push(Value::Other)
    }

    /// Makes a tuple of the topmost `len` values.
    fn tuple(&mut self, len: usize) -> Result<()> {
        let bottom = self.marks.last().copied().unwrap_or(0);
        let Some(first) = (self.stack.len().checked_sub(len)).filter(|&first| first >= bottom)
        else {
            bail!("the pickle takes a value that is not there");
        };
        let items = self.items.len() as u32;
        self.items.extend(self.stack.drain(first..));
        self.push(Value::Tuple(items, self.items.len() as u32))
    }

    fn global(&mut self) -> Result<()> {
        let name = self.pop()?;
        let module = self.pop()?;
        self.push(Value::Global(module, name))
    }

    fn call(&mut self, callable: Id, args: Id) -> Result<()> {
        self.push(Value::Call {
            callable,
            args,
            entries: vec![],
        })
    }

    fn append(&mut self, items: Vec<Id>) -> Result<()> {
        let top = self.top()?;
        if let Value::List(list) = &mut self.values[top.index()] {
            list.extend(items);
        }
        Ok(())
    }

    /// Sets entries of a dict or of an object that acts as one; `items` alternates keys and values.
    fn set(&mut self, items: Vec<Id>) -> Result<()> {
        let (pairs, []) = items.as_chunks() else {
            bail!("the pickle sets a key without a value");
        };
        let top = self.top()?;
        let entries = match &mut self.values[top.index()] {
            Value::Dict(entries) | Value::Call { entries, .. } => entries,
            _ => bail!("the pickle sets entries of what is no dict"),
        };
        entries.extend(pairs.iter().map(|&[key, value]| (key, value)));
        Ok(())
    }
}

fn text_or_other(bytes: &[u8]) -> Value<'_> {
    std::str::from_utf8(bytes).map_or(Value::Other, Value::Str)
}
