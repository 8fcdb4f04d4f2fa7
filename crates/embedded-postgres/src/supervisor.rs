//! The child process, which supervises PostgreSQL.

use std::{
    fs,
    future::pending,
    io::{self, Write},
    path::{Path, PathBuf},
    thread,
    time::Instant,
};

use secrecy::ExposeSecret;
use tokio::{
    runtime,
    signal::unix::{Signal, SignalKind, signal},
    sync::oneshot,
};

use crate::{
    App, Error, Options, cluster::Cluster, dirs, install, installation::Installation,
    instance::InstanceDir, postmaster::Postmaster, privileges::ServiceUser,
};

/// Runs PostgreSQL until SIGINT, SIGTERM, SIGHUP or the end of the lifeline, and stops it
/// before returning. `nohup` disables SIGHUP. Prints one line to standard output, the URL, when
/// PostgreSQL accepts connections.
///
/// A process that runs as root switches to an unprivileged user for good. The function
/// starts its own runtime, so it must not be called from an asynchronous context.
///
/// # Errors
/// Returns an error if there is no PostgreSQL, if it cannot use its directories, or if it
/// exits without a request.
pub fn run(app: &App, options: &Options) -> Result<(), Error> {
    let (data_dir, cache_dir) = prepare_dirs(app, options)?;
    let runtime = runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(Error::io("start", "the asynchronous runtime"))?;
    let result = runtime.block_on(async {
        let mut signals = StopSignals::listen(options.lifeline)?;
        let instance = tokio::select! {
            instance = InstanceDir::acquire(app, data_dir) => instance?,
            reason = signals.recv() => {
                log_early_stop(reason);
                return Ok(());
            }
        };
        supervise(app, &instance, &cache_dir, &mut signals).await
    });
    // Unpacking a download cannot be canceled; it ends with the process.
    runtime.shutdown_background();
    result
}

/// Creates the data directory (`None` if it is temporary) and the cache directory, and
/// switches to the user that owns them.
fn prepare_dirs(app: &App, options: &Options) -> Result<(Option<PathBuf>, PathBuf), Error> {
    let user = ServiceUser::detect();
    let mut data_dir = None;
    if !options.temporary {
        let dir = dirs::data_dir(app, options.data_dir.as_deref())?;
        dirs::create_private_dir_all(app, &dir, user.as_ref())?;
        data_dir = Some(dir);
    }
    let cache_dir = dirs::cache_dir(app)?;
    // Without a cache directory, an installed PostgreSQL may still work.
    let _ = dirs::create_private_dir_all(app, &cache_dir, user.as_ref());
    if let Some(user) = user {
        tracing::info!(os_user = %user, "running as root, switching user");
        user.switch_to(app)?;
    }
    Ok((data_dir, cache_dir))
}

async fn supervise(
    app: &App,
    instance: &InstanceDir,
    cache_dir: &Path,
    signals: &mut StopSignals,
) -> Result<(), Error> {
    let started_at = Instant::now();
    let (installation, cluster) = tokio::select! {
        prepared = prepare_cluster(app, instance, cache_dir) => prepared?,
        reason = signals.recv() => {
            log_early_stop(reason);
            return Ok(());
        }
    };
    let mut postgres = Postmaster::start(app, instance, &installation, cluster).await?;
    let result = tokio::select! {
        result = serve(&mut postgres, instance, started_at) => result,
        reason = signals.recv() => {
            tracing::info!(reason, "stopping PostgreSQL");
            Ok(())
        }
    };
    postgres.stop().await;
    result
}

fn log_early_stop(reason: &'static str) {
    tracing::info!(reason, "stopping before PostgreSQL started");
}

/// Finds or downloads PostgreSQL, and opens or creates a cluster for it.
async fn prepare_cluster(
    app: &App,
    instance: &InstanceDir,
    cache_dir: &Path,
) -> Result<(Installation, Cluster), Error> {
    let installation = install::find(app, cache_dir, instance.path()).await?;
    let cluster = Cluster::open(app, instance, &installation).await?;
    Ok((installation, cluster))
}

/// Prints the URL when PostgreSQL accepts connections. Returns only if PostgreSQL did not
/// start, or exited without a request.
async fn serve(
    postgres: &mut Postmaster,
    instance: &InstanceDir,
    started_at: Instant,
) -> Result<(), Error> {
    postgres.wait_until_ready().await?;
    let elapsed_ms = u64::try_from(started_at.elapsed().as_millis()).unwrap_or(u64::MAX);
    tracing::info!(elapsed_ms, dir = %instance.path().display(), "PostgreSQL ready");
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "{}", postgres.url().expose_secret())
        .and_then(|()| stdout.flush())
        .map_err(Error::io("write the URL to", "standard output"))?;
    drop(stdout);
    Err(postgres.exited().await)
}

/// The events that stop PostgreSQL.
struct StopSignals {
    interrupt: Signal,
    terminate: Signal,
    /// The terminal was closed. `None` if `nohup` has started the process.
    hang_up: Option<Signal>,
    lifeline: Option<oneshot::Receiver<()>>,
}

impl StopSignals {
    /// Registers for all events. None of those that follow is lost.
    fn listen(lifeline: bool) -> Result<Self, Error> {
        let listen = |kind| signal(kind).map_err(Error::io("listen for", "signals"));
        Ok(Self {
            interrupt: listen(SignalKind::interrupt())?,
            terminate: listen(SignalKind::terminate())?,
            hang_up: (!ignores_hang_up()).then(|| listen(SignalKind::hangup())).transpose()?,
            lifeline: lifeline.then(end_of_stdin).transpose()?,
        })
    }

    /// Waits for the first event and returns its name.
    async fn recv(&mut self) -> &'static str {
        let lifeline = async {
            match &mut self.lifeline {
                Some(lifeline) => drop(lifeline.await),
                None => pending().await,
            }
        };
        let hang_up = async {
            match &mut self.hang_up {
                Some(signal) => drop(signal.recv().await),
                None => pending().await,
            }
        };
        tokio::select! {
            _ = self.interrupt.recv() => "SIGINT",
            _ = self.terminate.recv() => "SIGTERM",
            () = hang_up => "SIGHUP",
            () = lifeline => "lifeline closed",
        }
    }
}

/// Returns `true` if this process has inherited that it ignores SIGHUP (proc_pid_status(5)). Other
/// systems than Linux do not have the file.
fn ignores_hang_up() -> bool {
    let status = fs::read_to_string("/proc/self/status").unwrap_or_default();
    let ignored = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    let ignored = ignored.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    ignored.is_some_and(|mask| mask & (1 << (SignalKind::hangup().as_raw_value() - 1)) != 0)
}

/// Returns a receiver for the end of standard input. It is read on a separate thread: a read
/// cannot be canceled, and the runtime would wait for it on shutdown.
fn end_of_stdin() -> Result<oneshot::Receiver<()>, Error> {
    let (sender, receiver) = oneshot::channel();
    let watch = move || {
        let _ = io::copy(&mut io::stdin(), &mut io::sink());
        // The receiver is gone if a signal has arrived first.
        let _ = sender.send(());
    };
    thread::Builder::new()
        .name("lifeline".to_owned())
        .spawn(watch)
        .map_err(Error::io("watch", "standard input"))?;
    Ok(receiver)
}
