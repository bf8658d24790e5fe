//! The body of a request, from JSON: how large it may be, how long it may take, and that objects are objects.

use std::fmt;
use std::marker::PhantomData;
use std::sync::Arc;
use std::time::Duration;

use axum::body::{Body, Bytes, HttpBody};
use axum::extract::{FromRequest, Request};
use axum::http::StatusCode;
use axum::Json;
use serde::de::value::MapAccessDeserializer;
use serde::de::{DeserializeOwned, MapAccess, Visitor};
use serde::{Deserialize, Deserializer};
use tokio::time::timeout;

use crate::api::App;
use crate::draining::InFlight;
use crate::error::ApiError;

/// The byte order mark that some editors and languages put before UTF-8. A JSON parser may ignore it (RFC 8259, section 8.1).
const BYTE_ORDER_MARK: &[u8] = "\u{feff}".as_bytes();

#[derive(Clone, Copy)]
pub struct BodyLimits {
    pub max_bytes: usize,
    /// The longest time from the head of a request to the end of its body.
    pub timeout: Duration,
}

/// The body of a request, and what counts it as in flight.
pub struct Input<T>(pub T, pub InFlight);

impl<T: DeserializeOwned> FromRequest<Arc<App>> for Input<T> {
    type Rejection = ApiError;

    async fn from_request(request: Request, app: &Arc<App>) -> Result<Self, ApiError> {
        let limits = app.body_limits;
        // A body that announces too large a length is refused before it arrives.
        if request.body().size_hint().lower() > limits.max_bytes as u64 {
            let error = format!("the body is longer than {} bytes", limits.max_bytes);
            return Err(ApiError::new(StatusCode::PAYLOAD_TOO_LARGE, error));
        }
        let (parts, body) = request.into_parts();
        let read = Request::from_parts(parts.clone(), body);
        let bytes = match timeout(limits.timeout, Bytes::from_request(read, app)).await {
            Ok(read) => read?,
            Err(_) => {
                let seconds = limits.timeout.as_secs_f64();
                let error = format!("the body did not arrive within {seconds} s");
                return Err(ApiError::new(StatusCode::REQUEST_TIMEOUT, error));
            }
        };
        let in_flight = app.draining.enter();
        let bytes = match bytes.strip_prefix(BYTE_ORDER_MARK) {
            Some(rest) => bytes.slice_ref(rest),
            None => bytes,
        };
        let request = Request::from_parts(parts, Body::from(bytes));
        let Json(Object(input)) = Json::from_request(request, app).await?;
        Ok(Self(input, in_flight))
    }
}

/// Reads a struct from a JSON object. serde would also accept an array, taking its values for the fields in order, and so answer
/// a question that nobody asked.
pub struct Object<T>(pub T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct AnObject<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for AnObject<T> {
            type Value = T;

            fn expecting(&self, f: &mut fmt::Formatter) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<T, A::Error> {
                T::deserialize(MapAccessDeserializer::new(map))
            }
        }

        deserializer
            .deserialize_map(AnObject(PhantomData))
            .map(Self)
    }
}
