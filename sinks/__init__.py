"""ClickHouse: schema, migrations, the writer that follows the ledger, and the queries. It never decides anything about money."""
