"""The Faust apps that host `billing`'s step function on Kafka: one record of `usage.ledger` for each input message."""
