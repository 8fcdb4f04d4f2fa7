//! Reads and writes of a connection.

use std::{
    io::{self, IoSlice},
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

use super::{ConnectionState, stall::StallGuard};

/// How much a connection reads before it yields, in bytes: as much as the largest frame. A flood
/// of small frames would otherwise keep a thread busy for milliseconds.
///
/// Test: `a_connection_yields_after_its_read_budget`.
const READ_BUDGET_BYTES: usize = 16 * 1024;

/// The stream of a connection. It has a cooperative read budget, and tracks writes that wait for
/// the client to read.
pub(super) struct ConnectionIo<S> {
    stream: S,
    /// The bytes that may be read before the connection yields.
    read_budget: usize,
    connection: Arc<ConnectionState>,
    /// Present while a write waits.
    write_stall: Option<StallGuard>,
}

impl<S> ConnectionIo<S> {
    pub(super) fn new(stream: S, connection: Arc<ConnectionState>) -> Self {
        Self { stream, read_budget: READ_BUDGET_BYTES, connection, write_stall: None }
    }

    fn track_stall<T>(&mut self, written: Poll<T>) -> Poll<T> {
        self.write_stall = match written {
            Poll::Ready(_) => None,
            Poll::Pending => {
                self.write_stall.take().or_else(|| Some(self.connection.track_write()))
            }
        };
        written
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for ConnectionIo<S> {
    fn poll_read(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        buffer: &mut ReadBuf<'_>,
    ) -> Poll<io::Result<()>> {
        if self.read_budget == 0 {
            self.read_budget = READ_BUDGET_BYTES;
            context.waker().wake_by_ref();
            return Poll::Pending;
        }
        let before = buffer.filled().len();
        let read = Pin::new(&mut self.stream).poll_read(context, buffer);
        let len = buffer.filled().len() - before;
        // A connection that waits for data yields anyway.
        self.read_budget = if read.is_pending() {
            READ_BUDGET_BYTES
        } else {
            self.read_budget.saturating_sub(len)
        };
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for ConnectionIo<S> {
    fn poll_write(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[u8],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write(context, bytes);
        self.track_stall(written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        context: &mut Context<'_>,
        bytes: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.stream).poll_write_vectored(context, bytes);
        self.track_stall(written)
    }

    fn is_write_vectored(&self) -> bool {
        self.stream.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.stream).poll_flush(context);
        self.track_stall(flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, context: &mut Context<'_>) -> Poll<io::Result<()>> {
        Pin::new(&mut self.stream).poll_shutdown(context)
    }
}

#[cfg(test)]
mod tests {
    use std::{net::Ipv4Addr, task::Waker};

    use tokio_util::sync::CancellationToken;

    use super::*;
    use crate::limits::client_quota::{ClientLimits, ClientQuotas};

    #[test]
    fn a_connection_yields_after_its_read_budget() {
        let ip = Ipv4Addr::LOCALHOST.into();
        let quota = ClientQuotas::new(ClientLimits::default()).get(ip);
        let connection = ConnectionState::new(ip, quota, CancellationToken::new());
        // There is always more to read.
        let mut io = ConnectionIo::new(tokio::io::repeat(0), Arc::new(connection));
        let mut context = Context::from_waker(Waker::noop());
        let mut bytes = [0; 1024];
        let reads_before_yield = (0..1_000).take_while(|_| {
            let mut buffer = ReadBuf::new(&mut bytes);
            Pin::new(&mut io).poll_read(&mut context, &mut buffer).is_ready()
        });
        assert_eq!(reads_before_yield.count(), 16);
    }
}
