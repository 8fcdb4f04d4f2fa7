-- Prints each table of the service with the number of its rows, for the comparison in
-- docs/deployment.md.
select format('select %L, count(*) from %I', tablename, tablename)
from pg_catalog.pg_tables
where schemaname = 'public'
order by tablename
\gexec
