-- The tables can be distributed by owner (Citus): users as a reference table,
-- sessions by user_id, todos by owner_id. Hence the owner stands first in every
-- key and index of an owner's table.
--
-- Columns named ..._folded hold the text of their namesake without case, folded by
-- the service: uniqueness, search and order do not depend on the database's locale.
-- Text is compared by code point (collate "C") for the same reason.
--
-- Created by: the instant in the id, a UUIDv7.

create table users (
    id uuid not null constraint users_pkey primary key,
    username text collate "C" not null,
    username_folded text collate "C" not null,
    email text collate "C" not null,
    email_folded text collate "C" not null,
    password_hash text not null,
    -- Rises with every change of the password, and only then: a login opens no
    -- session for a password that is not the current one any more.
    password_version bigint not null,
    updated_at timestamptz not null,
    -- Rises with every change of what callers see of the user: the etag.
    version bigint not null,
    constraint users_username_key unique (username_folded),
    constraint users_email_key unique (email_folded)
);

create table sessions (
    user_id uuid not null
        constraint sessions_user_id_fkey references users (id) on delete cascade,
    id uuid not null,
    -- Counts the refresh tokens: only the one of this generation is good.
    generation integer not null,
    rotated_at timestamptz not null,
    expires_at timestamptz not null,
    user_agent text not null,
    peer text not null,
    constraint sessions_pkey primary key (user_id, id)
);

create table todos (
    owner_id uuid not null
        constraint todos_owner_id_fkey references users (id) on delete cascade,
    id uuid not null,
    title text collate "C" not null
        constraint todos_title_check check (char_length(title) between 1 and 200),
    title_folded text collate "C" not null,
    description text collate "C" not null
        constraint todos_description_check check (char_length(description) <= 10000),
    description_folded text collate "C" not null,
    -- The numbers of the contract's TodoState.
    state smallint not null
        constraint todos_state_check check (state between 1 and 5),
    updated_at timestamptz not null,
    -- Rises with every change: the etag.
    version bigint not null,
    constraint todos_pkey primary key (owner_id, id)
);

create index todos_owner_updated_at_idx on todos (owner_id, updated_at, id);
create index todos_owner_title_idx on todos (owner_id, title_folded, title, id);
