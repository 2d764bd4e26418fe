"""Getting data ready: any source turned into parquet shards, lists of addresses downloaded, and a look at what is there."""
