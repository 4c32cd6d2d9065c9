//! Which web pages may use us. Agents send no `Origin` and always may.

use hyper::{
    HeaderMap,
    header::{self, HeaderValue},
};

/// The origins of `http.allowed_origins`.
#[derive(Clone, Debug)]
pub struct Origins {
    all: bool,
    allowed: Vec<String>,
}

impl Origins {
    /// `*` anywhere in the list allows all.
    #[must_use]
    pub fn new(allowed: &[String]) -> Self {
        let plain = |origin: &String| origin.trim_end_matches('/').to_ascii_lowercase();
        Self { all: allowed.iter().any(|origin| origin == "*"), allowed: allowed.iter().map(plain).collect() }
    }

    /// Whether a request with these headers may be answered.
    pub(super) fn allow(&self, request: &HeaderMap) -> bool {
        let Some(origin) = request.get(header::ORIGIN) else { return true };
        let Ok(origin) = origin.to_str() else { return false };
        self.all || is_same(origin, request) || self.allowed.contains(&origin.to_ascii_lowercase())
    }

    /// What tells a browser that its page may read the answer.
    pub(super) fn share(&self, origin: Option<HeaderValue>, answer: &mut HeaderMap) {
        let Some(origin) = origin else { return };
        let shared_with = if self.all { HeaderValue::from_static("*") } else { origin };
        answer.insert(header::ACCESS_CONTROL_ALLOW_ORIGIN, shared_with);
        answer.insert(header::ACCESS_CONTROL_EXPOSE_HEADERS, HeaderValue::from_static("Link, Retry-After"));
        answer.append(header::VARY, HeaderValue::from_static("Origin"));
    }
}

/// The answer to a preflight, beside [`Origins::share`]. `methods` are those that a page may use.
pub(super) fn permit(answer: &mut HeaderMap, methods: &'static str) {
    answer.insert(header::ACCESS_CONTROL_ALLOW_METHODS, HeaderValue::from_static(methods));
    answer.insert(
        header::ACCESS_CONTROL_ALLOW_HEADERS,
        HeaderValue::from_static("Authorization, Content-Type, Halfway-Session, Last-Event-ID"),
    );
    answer.insert(header::ACCESS_CONTROL_MAX_AGE, HeaderValue::from_static("600"));
}

/// The page came from us: its origin is HTTPS at the host that the request names.
fn is_same(origin: &str, request: &HeaderMap) -> bool {
    let host = request.get(header::HOST).and_then(|host| host.to_str().ok());
    let plain = |host: &str| host.strip_suffix(":443").unwrap_or(host).to_ascii_lowercase();
    match (origin.strip_prefix("https://"), host) {
        (Some(origin), Some(host)) => plain(origin) == plain(host),
        _ => false,
    }
}

#[cfg(test)]
mod tests {
    use super::{HeaderMap, Origins, header};

    fn allowed(list: &[&str], origin: &str) -> bool {
        let list: Vec<_> = list.iter().map(|origin| (*origin).to_owned()).collect();
        let mut request = HeaderMap::new();
        request.insert(header::HOST, "turn.example.org".parse().unwrap());
        request.insert(header::ORIGIN, origin.parse().unwrap());
        Origins::new(&list).allow(&request)
    }

    #[test]
    fn the_same_origin_and_listed_ones_are_allowed() {
        assert!(allowed(&[], "https://turn.example.org"));
        assert!(allowed(&[], "https://TURN.example.org:443"));
        assert!(!allowed(&[], "http://turn.example.org"));
        assert!(!allowed(&[], "https://turn.example.org:8443"));
        assert!(!allowed(&[], "https://turn.example.org.evil.example"));
        assert!(!allowed(&[], "null"));
        assert!(allowed(&["https://app.example/"], "https://app.example"));
        assert!(!allowed(&["https://app.example"], "https://app.example:444"));
        assert!(allowed(&["*"], "null"));
        assert!(Origins::new(&[]).allow(&HeaderMap::new()), "agents send none");
    }
}
