//! Drives `signaling`: routes, WebSocket, ICE lists.
