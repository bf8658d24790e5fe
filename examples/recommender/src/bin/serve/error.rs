//! Every refusal as JSON: `{"error": what is wrong, "field": where, such as "pairs[3].movie"}`.

use std::error::Error;

use axum::extract::rejection::{BytesRejection, JsonRejection};
use axum::http::{header, HeaderValue, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::Json;
use serde::Serialize;

use crate::batcher::Failure;

#[derive(Debug)]
pub struct ApiError {
    status: StatusCode,
    body: Body,
}

#[derive(Debug, Serialize)]
struct Body {
    error: String,
    /// Absent if no single field is to blame.
    #[serde(skip_serializing_if = "Option::is_none")]
    field: Option<String>,
}

impl ApiError {
    pub fn new(status: StatusCode, error: impl Into<String>) -> Self {
        Self {
            status,
            body: Body {
                error: error.into(),
                field: None,
            },
        }
    }

    /// A question that the model in service, one of `kind`, does not answer; `instead` does.
    pub fn other_kind(kind: &str, instead: &str) -> Self {
        let error = format!("the model is one of {kind}: ask {instead}");
        Self::new(StatusCode::NOT_FOUND, error)
    }

    /// A value that is well-formed but out of range.
    pub fn field(field: impl Into<String>, error: impl Into<String>) -> Self {
        let mut refusal = Self::new(StatusCode::UNPROCESSABLE_ENTITY, error);
        refusal.body.field = Some(field.into());
        refusal
    }
}

impl IntoResponse for ApiError {
    fn into_response(self) -> Response {
        let mut response = (self.status, Json(self.body)).into_response();
        let header = match self.status {
            StatusCode::SERVICE_UNAVAILABLE => Some((header::RETRY_AFTER, "1")),
            // The rest of the body is not awaited.
            StatusCode::PAYLOAD_TOO_LARGE | StatusCode::REQUEST_TIMEOUT => {
                Some((header::CONNECTION, "close"))
            }
            _ => None,
        };
        if let Some((name, value)) = header {
            let value = HeaderValue::from_static(value);
            response.headers_mut().insert(name, value);
        }
        response
    }
}

impl From<Failure> for ApiError {
    fn from(failure: Failure) -> Self {
        match failure {
            Failure::Full => Self::new(StatusCode::SERVICE_UNAVAILABLE, "the queue is full"),
            Failure::Model(error) => {
                tracing::error!(error, "a computation failed");
                Self::new(StatusCode::INTERNAL_SERVER_ERROR, error)
            }
        }
    }
}

impl From<BytesRejection> for ApiError {
    fn from(rejection: BytesRejection) -> Self {
        Self::new(rejection.status(), rejection.body_text())
    }
}

impl From<JsonRejection> for ApiError {
    fn from(rejection: JsonRejection) -> Self {
        let mut refusal = Self::new(rejection.status(), rejection.body_text());
        // axum wraps the parser's own error, which knows the field.
        let mut cause: Option<&(dyn Error + 'static)> = Some(&rejection);
        while let Some(error) = cause {
            if let Some(error) =
                error.downcast_ref::<serde_path_to_error::Error<serde_json::Error>>()
            {
                refusal.body.error = error.inner().to_string();
                // "." is the whole body, and "?" is a part whose name the parser did not know yet.
                let path = error.path().to_string();
                let field = path.trim_end_matches(['.', '?']);
                refusal.body.field = (!field.is_empty()).then(|| field.to_owned());
            }
            cause = error.source();
        }
        refusal
    }
}
