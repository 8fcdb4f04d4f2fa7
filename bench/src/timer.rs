//! A timer with a resolution of microseconds.

use std::{
    os::fd::{AsFd, AsRawFd, RawFd},
    time::Instant,
};

use nix::sys::{
    time::TimeSpec,
    timerfd::{ClockId, Expiration, TimerFd, TimerFlags, TimerSetTimeFlags},
};
use tokio::io::unix::AsyncFd;

use crate::error::Result;

/// A timerfd (`timerfd_create(2)`). The resolution of tokio's timer is 1 ms, which is longer
/// than most calls take.
pub struct Timer(AsyncFd<Descriptor>);

/// Adds the `AsRawFd` that [`AsyncFd`] requires.
struct Descriptor(TimerFd);

impl AsRawFd for Descriptor {
    fn as_raw_fd(&self) -> RawFd {
        self.0.as_fd().as_raw_fd()
    }
}

impl Timer {
    pub fn new() -> Result<Self> {
        let flags = TimerFlags::TFD_NONBLOCK | TimerFlags::TFD_CLOEXEC;
        let timer = TimerFd::new(ClockId::CLOCK_MONOTONIC, flags)?;
        #[expect(deprecated, reason = "the replacement is unsafe; this descriptor never changes")]
        let timer = AsyncFd::new(Descriptor(timer))?;
        Ok(Self(timer))
    }

    pub async fn wait_until(&self, instant: Instant) -> Result<()> {
        let remaining = instant.saturating_duration_since(Instant::now());
        if remaining.is_zero() {
            return Ok(());
        }
        let timer = &self.0.get_ref().0;
        timer.set(Expiration::OneShot(TimeSpec::from(remaining)), TimerSetTimeFlags::empty())?;
        let mut readiness = self.0.readable().await?;
        timer.wait()?;
        readiness.clear_ready();
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    #[tokio::test]
    async fn the_timer_fires_once_for_each_wait() {
        let timer = Timer::new().expect("a timer");
        for _ in 0..2 {
            let instant = Instant::now() + Duration::from_micros(200);
            timer.wait_until(instant).await.expect("fires");
            assert!(Instant::now() >= instant);
        }
    }
}
