//! What we answer with: all of it at once, or events as they happen.

use std::{
    convert::Infallible,
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use bytes::Bytes;
use hyper::body::{Frame, SizeHint};
use tokio::sync::{mpsc, watch};

/// The body of an answer.
#[derive(Debug)]
pub(super) struct Body {
    content: Content,
    /// Dropped when all is sent.
    open: Option<Open>,
}

#[derive(Debug)]
enum Content {
    Whole(Bytes),
    Events(mpsc::Receiver<Bytes>),
}

impl Body {
    /// Pieces as they come, until the sender is dropped.
    pub(super) fn events(events: mpsc::Receiver<Bytes>) -> Self {
        Self { content: Content::Events(events), open: None }
    }

    /// Holds `open` until all is sent.
    pub(super) fn hold(&mut self, open: Open) {
        self.open = Some(open);
    }
}

impl Default for Body {
    fn default() -> Self {
        Bytes::new().into()
    }
}

impl<T: Into<Bytes>> From<T> for Body {
    fn from(whole: T) -> Self {
        Self { content: Content::Whole(whole.into()), open: None }
    }
}

impl hyper::body::Body for Body {
    type Data = Bytes;
    type Error = Infallible;

    fn poll_frame(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
    ) -> Poll<Option<Result<Frame<Bytes>, Infallible>>> {
        let piece = match &mut self.content {
            Content::Whole(whole) => {
                Poll::Ready(Some(std::mem::take(whole)).filter(|whole| !whole.is_empty()))
            }
            Content::Events(events) => events.poll_recv(cx),
        };
        piece.map(|piece| piece.map(|piece| Ok(Frame::data(piece))))
    }

    fn is_end_stream(&self) -> bool {
        matches!(&self.content, Content::Whole(whole) if whole.is_empty())
    }

    fn size_hint(&self) -> SizeHint {
        match &self.content {
            Content::Whole(whole) => SizeHint::with_exact(whole.len() as u64),
            Content::Events(_) => SizeHint::default(),
        }
    }
}

/// A request that is not answered to its end yet.
#[derive(Debug)]
pub(super) struct Open(Arc<watch::Sender<usize>>);

impl Open {
    /// One more in `count`, until it is dropped.
    pub(super) fn new(count: &Arc<watch::Sender<usize>>) -> Self {
        count.send_modify(|open| *open += 1);
        Self(Arc::clone(count))
    }
}

impl Drop for Open {
    fn drop(&mut self) {
        self.0.send_modify(|open| *open -= 1);
    }
}
