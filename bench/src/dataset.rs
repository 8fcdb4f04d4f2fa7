//! A seeded database with the fixtures for it.

use std::sync::Arc;

use crate::{
    client::Client,
    error::Result,
    fixtures::{CALLER_COUNT, Fixtures},
    launcher::{Launcher, Target},
    postgres::Database,
    requests,
    seed::{DatasetSize, seed},
};

/// A small dataset: little more than one page of todos for each caller.
pub const SMALL: DatasetSize = DatasetSize { users: CALLER_COUNT + 1, todos: 1_000 };

#[derive(Clone)]
pub struct Dataset {
    pub database: Database,
    pub size: DatasetSize,
    /// With access tokens that are signed with EdDSA.
    pub fixtures: Arc<Fixtures>,
    /// With access tokens that are signed with HS256.
    hs256_fixtures: Arc<Fixtures>,
}

impl Dataset {
    /// Migrates and seeds an empty database, and logs the callers and the owners of watched
    /// todos in. If `with_deep_page`, also looks up the page token of a deep page of the long
    /// list.
    pub async fn prepare(
        launcher: &Launcher,
        database: Database,
        size: DatasetSize,
        with_deep_page: bool,
        watched_count: u32,
    ) -> Result<Self> {
        let server = launcher.start(Target::Service, &database).await?;
        let hash = create_password_hash(&server.address, &database).await?;
        seed(&database, size, &hash).await?;
        // A new connection: the server closes connections that are idle for as long as
        // seeding takes.
        let mut client = Client::connect(&server.address).await?;
        let mut fixtures = Fixtures::log_in_all(&mut client, size, watched_count).await?;
        if with_deep_page {
            fixtures.page_through(&mut client, size.deep_page()).await?;
        }
        drop(client);
        server.stop().await?;
        let server = launcher.start_with_hs256(&database).await?;
        let mut client = Client::connect(&server.address).await?;
        let mut hs256_fixtures = Fixtures::log_in_all(&mut client, size, 0).await?;
        hs256_fixtures.share(&fixtures);
        drop(client);
        server.stop().await?;
        let (fixtures, hs256_fixtures) = (Arc::new(fixtures), Arc::new(hs256_fixtures));
        Ok(Self { database, size, fixtures, hs256_fixtures })
    }

    /// Returns the fixtures for calls to a target.
    pub fn fixtures_of(&self, launcher: &Launcher, target: Target) -> &Arc<Fixtures> {
        if launcher.has_hs256_tokens(target) { &self.hs256_fixtures } else { &self.fixtures }
    }
}

/// Signs a user up, and returns the user's password hash after deleting the user.
async fn create_password_hash(address: &str, database: &Database) -> Result<String> {
    let mut client = Client::connect(address).await?;
    client.users.create_user(requests::create_user("first")).await?;
    let delete = "delete from users returning password_hash";
    Ok(database.connect().await?.query_one(delete, &[]).await?.get(0))
}
