//! `fast-zero postgres`: the life of a private PostgreSQL.

use std::{
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

use super::{
    Error, Options,
    cluster::{self, Cluster},
    folders::{self, Home},
    install::{self, Installation},
    postmaster::Postmaster,
    privileges::ServiceUser,
};

/// Runs PostgreSQL until a signal (SIGINT, SIGTERM, SIGHUP) or the end of the lifeline,
/// and ends it before it returns. Prints one line on standard output, the URL, once
/// PostgreSQL answers.
///
/// Started as root, the process becomes another user for good.
///
/// # Errors
/// When there is no PostgreSQL, its folders cannot be used, or it ends by itself.
pub fn run(options: &Options) -> Result<(), Error> {
    let (data, cache) = settle(options)?;
    let runtime = runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(Error::io("starting a runtime for", "PostgreSQL"))?;
    let result = runtime.block_on(async {
        let mut end = End::listen(options.lifeline)?;
        let home = Home::take(data).await?;
        live(&home, &cache, &mut end).await
    });
    // A download that is being unpacked ends with the process.
    runtime.shutdown_background();
    result
}

/// Makes the folders of the data (none if they are to be thrown away) and of the
/// programs, and becomes the user whose they are.
fn settle(options: &Options) -> Result<(Option<PathBuf>, PathBuf), Error> {
    let user = ServiceUser::needed();
    let mut data = None;
    if !options.temporary {
        let folder = folders::data_folder(options.data_dir.as_deref())?;
        folders::make(&folder, user.as_ref())?;
        data = Some(folder);
    }
    let cache = folders::cache_folder()?;
    // Where this fails, an installed PostgreSQL may still do.
    let _ = folders::make(&cache, user.as_ref());
    if let Some(user) = user {
        user.assume()?;
        tracing::info!(%user, "PostgreSQL does not run as root, going on as another user");
    }
    Ok((data, cache))
}

/// From finding PostgreSQL to its end.
async fn live(home: &Home, cache: &Path, end: &mut End) -> Result<(), Error> {
    let began = Instant::now();
    let (installation, cluster) = tokio::select! {
        prepared = prepare(home, cache) => prepared?,
        why = end.wait() => {
            tracing::info!(why, "ending before PostgreSQL has started");
            return Ok(());
        }
    };
    let mut postgres = Postmaster::start(home, &installation, cluster).await?;
    let result = tokio::select! {
        result = serve(&mut postgres, home, began) => result,
        why = end.wait() => {
            tracing::info!(why, "ending PostgreSQL");
            Ok(())
        }
    };
    postgres.stop().await;
    result
}

/// PostgreSQL's programs and a data folder for them.
async fn prepare(home: &Home, cache: &Path) -> Result<(Installation, Cluster), Error> {
    let installation = install::find(cache, &cluster::versions(home.folder())).await?;
    let cluster = Cluster::open(home, &installation).await?;
    Ok((installation, cluster))
}

/// Tells the URL once PostgreSQL answers; returns only when PostgreSQL has ended by
/// itself, or has not started.
async fn serve(postgres: &mut Postmaster, home: &Home, began: Instant) -> Result<(), Error> {
    postgres.ready().await?;
    let folder = home.folder().display();
    let elapsed_seconds = began.elapsed().as_secs_f64();
    tracing::info!(elapsed_seconds, %folder, "PostgreSQL is ready");
    let mut stdout = io::stdout().lock();
    writeln!(stdout, "{}", postgres.url().expose_secret())
        .and_then(|()| stdout.flush())
        .map_err(Error::io("writing the URL to", "standard output"))?;
    drop(stdout);
    Err(postgres.ended().await)
}

/// What ends a PostgreSQL.
struct End {
    interrupt: Signal,
    terminate: Signal,
    /// The terminal was closed.
    hang_up: Signal,
    lifeline: Option<oneshot::Receiver<()>>,
}

impl End {
    /// From now on, nothing of it is missed.
    fn listen(lifeline: bool) -> Result<Self, Error> {
        let listen = |kind| signal(kind).map_err(Error::io("listening for", "signals"));
        Ok(Self {
            interrupt: listen(SignalKind::interrupt())?,
            terminate: listen(SignalKind::terminate())?,
            hang_up: listen(SignalKind::hangup())?,
            lifeline: lifeline.then(end_of_input).transpose()?,
        })
    }

    /// Waits for the first of them, and names it.
    async fn wait(&mut self) -> &'static str {
        let lifeline = async {
            match &mut self.lifeline {
                Some(lifeline) => drop(lifeline.await),
                None => pending().await,
            }
        };
        tokio::select! {
            _ = self.interrupt.recv() => "SIGINT",
            _ = self.terminate.recv() => "SIGTERM",
            _ = self.hang_up.recv() => "SIGHUP",
            () = lifeline => "the lifeline has ended",
        }
    }
}

/// Tells when standard input ends. On a thread of its own: reading cannot be given up,
/// and the runtime would wait for it at its end.
fn end_of_input() -> Result<oneshot::Receiver<()>, Error> {
    let (sender, receiver) = oneshot::channel();
    let watch = move || {
        let _ = io::copy(&mut io::stdin(), &mut io::sink());
        // Nobody listens when a signal has come first.
        let _ = sender.send(());
    };
    thread::Builder::new()
        .name("lifeline".to_owned())
        .spawn(watch)
        .map_err(Error::io("watching", "standard input"))?;
    Ok(receiver)
}
