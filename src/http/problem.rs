//! Errors over HTTP: `application/problem+json` (RFC 9457), with the `code` that frames use too.

use std::borrow::Cow;

use hyper::{
    Response, StatusCode,
    header::{self, HeaderName, HeaderValue},
};
use serde::Serialize;

use super::body::Body;
use crate::{credentials::token::TokenRefusal, signaling::refusal::Refusal};

/// A request that is not answered as asked.
#[derive(Clone, Debug)]
pub struct Problem {
    status: StatusCode,
    code: &'static str,
    detail: Cow<'static, str>,
    header: Option<(HeaderName, HeaderValue)>,
}

#[derive(Serialize)]
struct Details<'a> {
    r#type: &'static str,
    title: &'static str,
    status: u16,
    code: &'static str,
    detail: &'a str,
}

impl Problem {
    fn new(status: StatusCode, code: &'static str, detail: impl Into<Cow<'static, str>>) -> Self {
        Self { status, code, detail: detail.into(), header: None }
    }

    pub(super) fn bad_request(detail: &'static str) -> Self {
        Self::new(StatusCode::BAD_REQUEST, "badRequest", detail)
    }

    pub(super) fn no_token() -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "unauthorized", "send a token: Authorization: Bearer …")
            .with(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"))
    }

    pub(super) fn unauthorized(detail: &'static str) -> Self {
        Self::new(StatusCode::UNAUTHORIZED, "unauthorized", detail)
    }

    pub(super) fn forbidden(detail: &'static str) -> Self {
        Self::new(StatusCode::FORBIDDEN, "forbidden", detail)
    }

    pub(super) fn not_found() -> Self {
        Self::new(StatusCode::NOT_FOUND, "notFound", "nothing is served here")
    }

    /// `allowed` as the header `Allow` has it.
    pub(super) fn method_not_allowed(allowed: &'static str) -> Self {
        Self::new(StatusCode::METHOD_NOT_ALLOWED, "badRequest", format!("this takes {allowed}"))
            .with(header::ALLOW, HeaderValue::from_static(allowed))
    }

    pub(super) fn gone() -> Self {
        Self::new(StatusCode::GONE, "gone", "no such session, or no longer those frames: begin with hello")
    }

    pub(super) fn too_large() -> Self {
        Self::new(StatusCode::PAYLOAD_TOO_LARGE, "tooLarge", "the body is too large")
            .with(header::CONNECTION, HeaderValue::from_static("close"))
    }

    pub(super) fn upgrade_required() -> Self {
        Self::new(StatusCode::UPGRADE_REQUIRED, "badRequest", "this is a WebSocket (RFC 6455, version 13)")
            .with(header::UPGRADE, HeaderValue::from_static("websocket"))
    }

    pub(super) fn unavailable(detail: &'static str) -> Self {
        Self::new(StatusCode::SERVICE_UNAVAILABLE, "unavailable", detail)
            .with(header::RETRY_AFTER, HeaderValue::from_static("5"))
    }

    fn with(self, name: HeaderName, value: HeaderValue) -> Self {
        Self { header: Some((name, value)), ..self }
    }

    pub(super) fn response(self) -> Response<Body> {
        let title = self.status.canonical_reason().unwrap_or("Error");
        let Self { status, code, detail, header } = self;
        let body = Details { r#type: "about:blank", title, status: status.as_u16(), code, detail: &detail };
        let body = serde_json::to_vec(&body).expect("strings and a number become JSON");
        let mut response = Response::new(Body::from(body));
        *response.status_mut() = status;
        let headers = response.headers_mut();
        headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("application/problem+json"));
        headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
        headers.extend(header);
        response
    }
}

/// What a frame would be told, as a status.
impl From<&Refusal> for Problem {
    fn from(refusal: &Refusal) -> Self {
        let status = match refusal {
            Refusal::Token(refusal) => return (*refusal).into(),
            Refusal::Forbidden(_) => StatusCode::FORBIDDEN,
            Refusal::BadFrame(_) => StatusCode::BAD_REQUEST,
            Refusal::TooLarge(_) => StatusCode::PAYLOAD_TOO_LARGE,
            Refusal::RateLimited(_) | Refusal::QueueFull => StatusCode::TOO_MANY_REQUESTS,
            Refusal::PeerUnavailable => StatusCode::NOT_FOUND,
            Refusal::Unavailable(_) => StatusCode::SERVICE_UNAVAILABLE,
        };
        let problem = Self::new(status, refusal.code(), refusal.to_string());
        match refusal.retry_after() {
            Some(seconds) => problem.with(header::RETRY_AFTER, seconds.into()),
            None => problem,
        }
    }
}

impl From<TokenRefusal> for Problem {
    fn from(refusal: TokenRefusal) -> Self {
        let detail = Refusal::from(refusal).to_string();
        Self::new(StatusCode::UNAUTHORIZED, refusal.code(), detail)
            .with(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer error=\"invalid_token\""))
    }
}
