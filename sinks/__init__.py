"""ClickHouse: schema, migrations, the writer that follows the ledger, and the queries. It decides nothing."""
