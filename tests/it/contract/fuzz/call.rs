//! Arbitrary calls, and which results are allowed.

use std::fmt;

use fast_zero::proto::error::v1::ErrorReason;
use proptest::{collection::vec, prelude::*, sample::select};
use prost::Message;
use prost_reflect::{DynamicMessage, Kind, MessageDescriptor};
use tonic::{
    Code, Status,
    metadata::{Ascii, MetadataValue},
};
use tonic_types::StatusExt;

use super::caller::Caller;
use crate::{
    contract::access::PUBLIC,
    support::{
        Client, RpcResult,
        messages::{Method, any_bytes, any_message},
        raw_client::RawClient,
        tokens::{Jwt, json_string},
    },
};

pub(super) type AsciiValue = MetadataValue<Ascii>;

/// A call to send.
#[derive(Clone)]
pub(super) struct Call {
    pub(super) method: Method,
    pub(super) bytes: Vec<u8>,
    pub(super) authorization: Authorization,
    pub(super) timeout: Option<AsciiValue>,
    pub(super) request_id: Option<AsciiValue>,
    pub(super) user_agent: Option<AsciiValue>,
}

#[derive(Clone, Debug)]
pub(super) struct Authorization {
    pub(super) values: Vec<AsciiValue>,
    pub(super) is_valid: bool,
}

impl fmt::Debug for Call {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter
            .debug_struct(&self.method.path)
            .field("bytes", &self.bytes.escape_ascii().to_string())
            .field("message", &self.message())
            .field("authorization", &self.authorization)
            .field("grpc-timeout", &self.timeout)
            .field("x-request-id", &self.request_id)
            .field("user-agent", &self.user_agent)
            .finish()
    }
}

pub(super) fn metadata_value(bytes: impl AsRef<[u8]>) -> AsciiValue {
    AsciiValue::try_from(bytes.as_ref()).expect("a metadata value")
}

/// Generates any valid value of a header.
pub(super) fn any_metadata_value() -> impl Strategy<Value = Vec<u8>> {
    vec(prop_oneof![4 => 0x20_u8..0x7f, 1 => 0x80_u8..=0xff, 1 => Just(b'\t')], 0..300)
}

pub(super) fn any_authorization(client: &Client) -> BoxedStrategy<Authorization> {
    let token = client.tokens().access_token.clone();
    let jwt = Jwt::for_client(client);
    let valid = format!("Bearer {token}");
    let invalid = |values: Vec<Vec<u8>>| Authorization {
        values: values.into_iter().map(metadata_value).collect(),
        is_valid: false,
    };
    let twice = vec![valid.clone().into_bytes(); 2];
    // Claims with values of any type, signed with the key of the service.
    let claim = (
        select(&["iss", "aud", "sub", "sid", "exp", "nbf", "typ", "alg"][..]),
        prop_oneof![
            "[ -~&&[^\"\\\\]]{0,20}".prop_map(|text| json_string(&text)),
            select(&["null", "[]", "{}", "true", "1e400", "-1"][..]).prop_map(str::to_owned),
            (0..1_000_i64).prop_map(|number| number.to_string()),
        ],
    );
    let signed = claim.prop_map(move |(name, json)| {
        let jwt = jwt.clone();
        let jwt = match name {
            "typ" | "alg" => jwt.header(name, json),
            // An `nbf` in the past alone would be valid.
            "nbf" => jwt.claim("exp", "0").claim("nbf", json),
            _ => jwt.claim(name, json),
        };
        vec![format!("Bearer {}", jwt.signed()).into_bytes()]
    });
    let cut =
        (0..token.len()).prop_map(move |at| vec![format!("Bearer {}", &token[..at]).into_bytes()]);
    prop_oneof![
        10 => Just(Authorization { values: vec![metadata_value(valid)], is_valid: true }),
        1 => Just(Authorization { values: Vec::new(), is_valid: false }),
        1 => Just(twice).prop_map(invalid),
        1 => vec(any_metadata_value(), 1..3).prop_map(invalid),
        1 => any_metadata_value().prop_map(|rest| vec![[b"Bearer ", &rest[..]].concat()]).prop_map(invalid),
        1 => cut.prop_map(invalid),
        2 => signed.prop_map(invalid),
    ]
    .boxed()
}

/// Generates an entry that is usually absent.
pub(super) fn optional(
    value: impl Strategy<Value = Vec<u8>> + 'static,
) -> BoxedStrategy<Option<AsciiValue>> {
    prop_oneof![2 => Just(None), 1 => value.prop_map(|bytes| Some(metadata_value(bytes)))].boxed()
}

pub(super) fn any_timeout() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof![
        4 => "[1-9]S|[5-9][0-9]{3}m|99999999H".prop_map(String::into_bytes),
        1 => "0{0,7}[0-9][HMSmun]|[0-9]{1,8}[un]".prop_map(String::into_bytes),
        1 => "[0-9]{0,9}[ -~]{0,2}".prop_map(String::into_bytes),
        1 => any_metadata_value(),
    ]
}

pub(super) fn any_request_id() -> impl Strategy<Value = Vec<u8>> {
    prop_oneof!["[!-~]{1,128}".prop_map(String::into_bytes), any_metadata_value()]
}

pub(super) fn any_call(method: &Method, caller: &Caller) -> BoxedStrategy<Call> {
    let message = any_message(&method.request, &caller.known);
    let bytes = prop_oneof![
        3 => message.prop_map(|message| message.encode_to_vec()),
        1 => any_bytes(&method.request, &caller.known),
    ];
    let method = method.clone();
    (
        bytes,
        any_authorization(&caller.client),
        optional(any_timeout()),
        optional(any_request_id()),
        optional(any_metadata_value()),
    )
        .prop_map(move |(bytes, authorization, timeout, request_id, user_agent)| {
            let method = method.clone();
            Call { method, bytes, authorization, timeout, request_id, user_agent }
        })
        .boxed()
}

/// The deadline of a call according to its metadata.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(super) enum Deadline {
    Long,
    Short,
    Malformed,
}

impl Call {
    pub(super) fn message(&self) -> Result<DynamicMessage, prost::DecodeError> {
        DynamicMessage::decode(self.method.request.clone(), &*self.bytes)
    }

    pub(super) async fn send(&self, raw: &RawClient) -> RpcResult<Vec<u8>> {
        let mut raw = raw.clone();
        for value in &self.authorization.values {
            raw = raw.with_metadata_value("authorization", value.clone());
        }
        for (key, value) in [
            ("grpc-timeout", &self.timeout),
            ("x-request-id", &self.request_id),
            ("user-agent", &self.user_agent),
        ] {
            if let Some(value) = value {
                raw = raw.with_metadata_value(key, value.clone());
            }
        }
        if self.method.is_stream {
            return raw.first_message(&self.method.path, &self.bytes).await;
        }
        raw.call(&self.method.path, &self.bytes).await
    }

    pub(super) fn deadline(&self) -> Deadline {
        let Some(value) = &self.timeout else {
            return Deadline::Long;
        };
        let nanoseconds = value.as_encoded_bytes().split_last().and_then(|(unit, digits)| {
            let is_count = (1..=8).contains(&digits.len()) && digits.iter().all(u8::is_ascii_digit);
            let count: u128 =
                std::str::from_utf8(digits).ok()?.parse().ok().filter(|_| is_count)?;
            let units = [(b'H', 3_600_000_000_000), (b'M', 60_000_000_000), (b'S', 1_000_000_000)];
            let units = units.into_iter().chain([(b'm', 1_000_000), (b'u', 1_000), (b'n', 1)]);
            units.into_iter().find(|(name, _)| name == unit).map(|(_, unit)| count * unit)
        });
        match nanoseconds {
            None => Deadline::Malformed,
            Some(5_000_000_000..) => Deadline::Long,
            Some(_) => Deadline::Short,
        }
    }

    /// Returns the allowed codes of the call. `None` stands for success.
    pub(super) fn allowed(&self) -> Vec<Option<Code>> {
        let is_public = PUBLIC.contains(&&*self.method.path);
        let mut allowed: Vec<_> = if !is_public && !self.authorization.is_valid {
            [Code::Unauthenticated].map(Some).into()
        } else if self.deadline() == Deadline::Malformed {
            [Code::InvalidArgument].map(Some).into()
        } else if self.message().is_err() {
            [Code::Internal].map(Some).into()
        } else {
            let rejected = [
                Code::InvalidArgument,
                Code::NotFound,
                Code::PermissionDenied,
                Code::AlreadyExists,
                Code::Aborted,
                Code::FailedPrecondition,
                Code::Unauthenticated,
                Code::ResourceExhausted,
            ];
            rejected.into_iter().map(Some).chain([None]).collect()
        };
        if self.deadline() == Deadline::Short {
            allowed.push(Some(Code::DeadlineExceeded));
        }
        allowed
    }

    /// Checks the result of the call. Returns a description of the fault.
    pub(super) fn check(&self, result: &RpcResult<Vec<u8>>) -> Result<(), String> {
        let code = result.as_ref().err().map(Status::code);
        let allowed = self.allowed();
        if !allowed.contains(&code) {
            return Err(format!("{code:?} is none of {allowed:?}"));
        }
        match result {
            Ok(response) => {
                let message =
                    DynamicMessage::decode(self.method.response.clone(), &**response.get_ref());
                let message = message.map_err(|error| format!("invalid response: {error}"))?;
                let is_known = message.unknown_fields().count() == 0;
                is_known.then_some(()).ok_or_else(|| format!("unknown fields: {message:?}"))
            }
            Err(status) => self.check_details(status),
        }
    }

    pub(super) fn check_details(&self, status: &Status) -> Result<(), String> {
        let details = status.get_error_details();
        let info = details.error_info().ok_or("no ErrorInfo")?;
        let reason = format!("ERROR_REASON_{}", info.reason);
        if info.domain != "fastzero" || ErrorReason::from_str_name(&reason).is_none() {
            return Err(format!("unknown reason {reason} of {}", info.domain));
        }
        let named = details.request_info().map(|info| info.request_id.as_bytes());
        let returned = status.metadata().get("x-request-id").map(AsciiValue::as_encoded_bytes);
        let sent = self.request_id.as_ref().map(AsciiValue::as_encoded_bytes);
        let is_one =
            |id: &&[u8]| (1..=128).contains(&id.len()) && id.iter().all(u8::is_ascii_graphic);
        if !named.as_ref().is_some_and(is_one)
            || named != returned
            || sent.filter(is_one).is_some_and(|id| named != Some(id))
        {
            return Err(format!("the request's id is {named:?}, {returned:?}"));
        }
        if status.code() == Code::InvalidArgument {
            let violations = details.bad_request().map(|invalid| &*invalid.field_violations);
            let violations = violations.unwrap_or_default();
            let is_field =
                |path: &str| path == "grpc-timeout" || has_field(&self.method.request, path);
            if violations.is_empty() || !violations.iter().all(|invalid| is_field(&invalid.field)) {
                return Err(format!("the fields at fault are {violations:?}"));
            }
        }
        Ok(())
    }
}

/// Returns `true` if messages of this type have a field with this path.
pub(super) fn has_field(kind: &MessageDescriptor, path: &str) -> bool {
    let (name, rest) = path.split_once('.').map_or((path, None), |(name, rest)| (name, Some(rest)));
    match (kind.get_field_by_name(name), rest) {
        (None, _) => false,
        (Some(_), None) => true,
        (Some(field), Some(rest)) => {
            matches!(field.kind(), Kind::Message(kind) if has_field(&kind, rest))
        }
    }
}
