-- The open reset code of each user, at most one, which an operator created. ResetPassword deletes
-- it.
create table password_reset_codes (
    user_id uuid not null
        constraint password_reset_codes_pkey primary key
        constraint password_reset_codes_user_id_fkey references users (id) on delete cascade,
    -- SHA-256 of the secret part of the code.
    code_hash bytea not null
        constraint password_reset_codes_code_hash_check check (octet_length(code_hash) = 32),
    expires_at timestamptz not null
);
