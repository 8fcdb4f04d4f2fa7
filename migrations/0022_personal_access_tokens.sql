-- The personal access tokens of users, also those that have expired: at most 100 a user. A
-- token is found by its key; its text is not stored.
--
-- Created by: the instant in the id, a UUIDv7.
create table personal_access_tokens (
    user_id uuid not null
        constraint personal_access_tokens_user_id_fkey references users (id) on delete cascade,
    id uuid not null,
    name text collate "C" not null
        constraint personal_access_tokens_name_check check (char_length(name) between 1 and 100),
    -- Sorted, without repetitions.
    scopes text[] not null,
    expires_at timestamptz not null,
    -- In UTC; null until the first use.
    last_used_date date,
    -- SHA-256 of the secret part of the text.
    secret_hash bytea not null
        constraint personal_access_tokens_secret_hash_check check (octet_length(secret_hash) = 32),
    constraint personal_access_tokens_pkey primary key (user_id, id)
);
