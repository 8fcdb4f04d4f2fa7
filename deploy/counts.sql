-- Prints each table with the number of its rows, for the comparison in docs/deployment.md.
select format('select %L, count(*) from %s', name, name)
from (
    select format('%I.%I', schemaname, tablename) as name
    from pg_catalog.pg_tables
    where schemaname <> 'information_schema' and schemaname !~ '^pg_'
) tables
order by name collate "C"
\gexec
