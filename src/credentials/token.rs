//! Agents' tokens: JWT, HS256 (RFC 7519).
