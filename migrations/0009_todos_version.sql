-- The version of a todo becomes the time of its last update in microseconds. Within an owner it
-- is unique: of todos with equal times, and those that follow directly, each gets the next
-- microsecond, in the order of lists by update time.
--
-- Writes wait meanwhile, about a minute for a million todos. Until a vacuum, the table contains the
-- old rows, too: it takes up to twice the disk space.
do $$
begin
    -- Without effect outside of Citus.
    perform set_config('citus.multi_shard_modify_mode', 'sequential', true);
    update todos
    set version = numbered.version
    from (
        select owner_id, id,
            number + max(updated - number) over (
                partition by owner_id order by number rows unbounded preceding
            ) as version
        from (
            select owner_id, id,
                (extract(epoch from replaced_updated_at at time zone 'UTC') * 1000000)::bigint
                    as updated,
                row_number() over (
                    partition by owner_id order by replaced_updated_at, id
                ) as number
            from todos
        ) as ordered
    ) as numbered
    where todos.owner_id = numbered.owner_id and todos.id = numbered.id;
end $$;
