"""Servers that a laptop lacks: a Kafka broker and a Redis on loopback."""

from deploy.local.errors import LocalStackError
from deploy.local.kafka import ApacheKafka, EmbeddedKafka
from deploy.local.kafka_cluster import ApacheKafkaCluster
from deploy.local.process import ChildProcess
from deploy.local.redis import RedisServer
from deploy.local.stack import LocalStack

__all__ = [
    "ApacheKafka",
    "ApacheKafkaCluster",
    "ChildProcess",
    "EmbeddedKafka",
    "LocalStack",
    "LocalStackError",
    "RedisServer",
]
