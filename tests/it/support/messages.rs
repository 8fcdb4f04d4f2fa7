//! Arbitrary messages of the API, generated from its descriptors: valid, unusual and
//! malformed ones.

use std::collections::BTreeMap;

use fast_zero::proto::FILE_DESCRIPTOR_SET;
use proptest::{
    collection::vec,
    prelude::*,
    sample::{Index, select},
};
use prost::Message;
use prost_reflect::{
    DescriptorPool, DynamicMessage, FieldDescriptor, Kind, MessageDescriptor, Value,
};

/// A method of the API.
#[derive(Clone, Debug)]
pub struct Method {
    pub name: String,
    pub path: String,
    pub is_stream: bool,
    pub request: MessageDescriptor,
    pub response: MessageDescriptor,
}

/// Returns all methods of the API.
pub fn methods() -> Vec<Method> {
    decode_methods(FILE_DESCRIPTOR_SET)
}

/// Returns the methods of health and reflection, which need no token.
pub fn system_methods() -> Vec<Method> {
    [
        tonic_health::pb::FILE_DESCRIPTOR_SET,
        tonic_reflection::pb::v1::FILE_DESCRIPTOR_SET,
        tonic_reflection::pb::v1alpha::FILE_DESCRIPTOR_SET,
    ]
    .into_iter()
    .flat_map(decode_methods)
    .collect()
}

fn decode_methods(descriptors: &[u8]) -> Vec<Method> {
    let pool = DescriptorPool::decode(descriptors).expect("valid descriptors");
    let mut methods = Vec::new();
    for service in pool.services() {
        methods.extend(service.methods().map(|method| Method {
            name: method.name().to_owned(),
            path: format!("/{}/{}", service.full_name(), method.name()),
            is_stream: method.is_server_streaming(),
            request: method.input(),
            response: method.output(),
        }));
    }
    methods
}

/// Valid values, by the names of their fields.
pub type KnownValues = BTreeMap<&'static str, Vec<String>>;

/// Texts that parsers often handle wrongly.
const EDGE_CASE_TEXTS: [&str; 33] = [
    "",
    " ",
    "\0",
    "a\0b",
    "a\r\n\tb",
    "\u{7f}",
    "\u{85}",
    "\u{3000}",
    "\u{301}",
    "e\u{301}",
    "İ",
    "ß",
    "🦀",
    "\u{202e}abc",
    "\u{feff}",
    "\u{10ffff}",
    "%",
    "_",
    "\\",
    "'; drop table users; --",
    "$1",
    "null",
    "*",
    "title,state",
    "todo.title",
    "user.email",
    "ME",
    "-1",
    "9223372036854775807",
    "99999999999999999999",
    "00000000-0000-0000-0000-000000000000",
    "ffffffff-ffff-ffff-ffff-ffffffffffff",
    "ana@İ.com",
];

fn any_text(field: &FieldDescriptor, known: &KnownValues) -> BoxedStrategy<String> {
    let all: Vec<_> = known.values().flatten().cloned().collect();
    let valid = known.get(field.name()).unwrap_or(&all).clone();
    prop_oneof![
        20 => select(valid),
        1 => select(all),
        2 => select(&EDGE_CASE_TEXTS[..]).prop_map(str::to_owned),
        1 => any::<String>(),
        1 => (select(&["x", "🦀", "e\u{301}", "\n", " "][..]), select(&[33, 129, 201, 10_001, 70_000][..]))
            .prop_map(|(text, count)| text.repeat(count)),
    ]
    .boxed()
}

fn any_number() -> impl Strategy<Value = i32> {
    prop_oneof![4 => 0..3, 1 => select(&[-1, 1_000, 1_001, i32::MIN, i32::MAX][..]), 1 => any::<i32>()]
}

fn any_value(field: &FieldDescriptor, known: &KnownValues) -> BoxedStrategy<Value> {
    match field.kind() {
        Kind::String => any_text(field, known).prop_map(Value::String).boxed(),
        Kind::Int32 => any_number().prop_map(Value::I32).boxed(),
        Kind::Bool => any::<bool>().prop_map(Value::Bool).boxed(),
        Kind::Int64 => any::<i64>().prop_map(Value::I64).boxed(),
        Kind::Enum(kind) => {
            let numbers: Vec<_> = kind.values().map(|value| value.number()).collect();
            prop_oneof![6 => select(numbers), 1 => any::<i32>()].prop_map(Value::EnumNumber).boxed()
        }
        Kind::Message(kind) => any_message(&kind, known).prop_map(Value::Message).boxed(),
        other => panic!("no strategy for fields of {other:?}"),
    }
}

fn any_field(field: &FieldDescriptor, known: &KnownValues) -> BoxedStrategy<Option<Value>> {
    let value = any_value(field, known);
    let value =
        if field.is_list() { vec(value, 0..4).prop_map(Value::List).boxed() } else { value };
    // Fields without valid values are absent more often.
    let is_known = known.contains_key(field.name()) || matches!(field.kind(), Kind::Message(_));
    let absent_weight = if is_known { 1 } else { 4 };
    prop_oneof![absent_weight => Just(None), 4 => value.prop_map(Some)].boxed()
}

/// An unknown field, with the number 1000: as a varint, four bytes, a text and a group.
const UNKNOWN_FIELDS: [&[u8]; 4] =
    [b"\xc0\x3e\x7f", b"\xc5\x3e\0\0\0\0", b"\xc2\x3e\x01a", b"\xc3\x3e\xc4\x3e"];

/// Generates messages of this type.
pub fn any_message(kind: &MessageDescriptor, known: &KnownValues) -> BoxedStrategy<DynamicMessage> {
    let (fields, kind): (Vec<_>, _) = (kind.fields().collect(), kind.clone());
    let values: Vec<_> = fields.iter().map(|field| any_field(field, known)).collect();
    let unknown = prop_oneof![9 => Just(&b""[..]), 1 => select(&UNKNOWN_FIELDS[..])];
    (values, unknown)
        .prop_map(move |(values, unknown)| {
            let mut message = DynamicMessage::new(kind.clone());
            for (field, value) in fields.iter().zip(values) {
                if let Some(value) = value {
                    message.set_field(field, value);
                }
            }
            message.merge(unknown).expect("an unknown field");
            message
        })
        .boxed()
}

/// Generates bytes, most of which are almost a message of this type.
pub fn any_bytes(kind: &MessageDescriptor, known: &KnownValues) -> BoxedStrategy<Vec<u8>> {
    let change = (any::<Index>(), any::<u8>(), 0..4);
    let mutated = (any_message(kind, known), vec(change, 1..4)).prop_map(|(message, changes)| {
        let mut bytes = message.encode_to_vec();
        for (at, byte, change) in changes {
            let at = at.index(bytes.len() + 1);
            match change {
                0 => bytes.truncate(at),
                1 => bytes.insert(at, byte),
                2 if at < bytes.len() => bytes[at] ^= byte,
                _ => bytes.extend_from_within(at..),
            }
        }
        bytes
    });
    prop_oneof![3 => mutated, 1 => vec(any::<u8>(), 0..80)].boxed()
}
