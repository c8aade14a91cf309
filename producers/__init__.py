"""What a server of models embeds to count what it serves: the meter, its journal on disk, and the publisher to Kafka."""
