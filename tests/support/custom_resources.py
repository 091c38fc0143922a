"""Schemas of the custom resources in deploy/kubernetes: the fields that are used there, and no others.

Written for these tests from the published API types:
- ScaledObject, TriggerAuthentication: kedacore/keda, apis/keda/v1alpha1 (2.17)
- ServiceMonitor: prometheus-operator/prometheus-operator, pkg/apis/monitoring/v1 (0.80)
- LeaderWorkerSet: kubernetes-sigs/lws, api/leaderworkerset/v1 (0.7)

A field that is not here is refused, whether it exists or not: look it up before adding it. What these kinds
share with Kubernetes itself is taken from its own schemas by reference.
"""

from __future__ import annotations

from typing import Any

Schema = dict[str, Any]
CORE = "https://kubernetes.io/api/_definitions.json#/$defs/"
STRING: Schema = {"type": "string"}
TEXT: Schema = {"type": "string", "minLength": 1}
STRINGS: Schema = {"type": "array", "items": STRING}
COUNT: Schema = {"type": "integer", "minimum": 0}
INT_OR_STRING: Schema = {"type": ["integer", "string"]}
DURATION: Schema = {"type": "string", "pattern": r"^[0-9]+(ms|s|m|h)$"}


def thing(required: str = "", **properties: Schema) -> Schema:
    """An object with these fields only; `required` names some of them, separated by blanks."""
    return {
        "type": "object",
        "properties": properties,
        "required": required.split(),
        "additionalProperties": False,
    }


def core(name: str) -> Schema:
    """A type of Kubernetes itself."""
    return {"$ref": CORE + name}


def kind(spec: Schema) -> Schema:
    """A whole object around `spec`."""
    return thing(
        "apiVersion kind metadata spec",
        apiVersion=STRING,
        kind=STRING,
        metadata=core("io.k8s.apimachinery.pkg.apis.meta.v1.ObjectMeta"),
        spec=spec,
    )


AUTHENTICATIONS = ["TriggerAuthentication", "ClusterTriggerAuthentication"]

# pkg/scalers/redis_streams_scaler.go: what the trigger reads, all of it strings.
REDIS_STREAMS: Schema = {
    **thing(
        "address stream consumerGroup",
        address={"type": "string", "pattern": r"^[^:]+:\d+$"},
        stream=TEXT,
        consumerGroup=TEXT,
        lagCount={"type": "string", "pattern": r"^[1-9]\d*$"},
        activationLagCount={"type": "string", "pattern": r"^\d+$"},
        pendingEntriesCount={"type": "string", "pattern": r"^[1-9]\d*$"},
        databaseIndex={"type": "string", "pattern": r"^\d+$"},
        enableTLS={"enum": ["true", "false"]},
    ),
    # With a lag, the number that wakes a workload has to be said, and pending entries are not looked at.
    "dependentRequired": {"lagCount": ["activationLagCount"]},
    "oneOf": [{"required": ["lagCount"]}, {"required": ["pendingEntriesCount"]}],
}

SCALED_OBJECT = kind(
    thing(
        "scaleTargetRef triggers",
        scaleTargetRef=thing(
            "name", apiVersion=STRING, kind=STRING, name=TEXT, envSourceContainerName=STRING
        ),
        pollingInterval={"type": "integer", "minimum": 1},
        cooldownPeriod=COUNT,
        initialCooldownPeriod=COUNT,
        idleReplicaCount=COUNT,
        minReplicaCount=COUNT,
        maxReplicaCount={"type": "integer", "minimum": 1},
        advanced=thing(
            restoreToOriginalReplicaCount={"type": "boolean"},
            horizontalPodAutoscalerConfig=thing(
                name=STRING, behavior=core("io.k8s.api.autoscaling.v2.HorizontalPodAutoscalerBehavior")
            ),
        ),
        triggers={
            "type": "array",
            "minItems": 1,
            "items": thing(
                "type metadata",
                type={"enum": ["redis-streams"]},
                name=STRING,
                metricType={"enum": ["AverageValue", "Value"]},
                useCachedMetrics={"type": "boolean"},
                metadata=REDIS_STREAMS,
                authenticationRef=thing(
                    "name",
                    name=TEXT,
                    kind={"enum": AUTHENTICATIONS},
                ),
            ),
        },
    )
)

TRIGGER_AUTHENTICATION = kind(
    thing(
        "secretTargetRef",
        secretTargetRef={
            "type": "array",
            "minItems": 1,
            "items": thing("parameter name key", parameter=TEXT, name=TEXT, key=TEXT),
        },
    )
)

SERVICE_MONITOR = kind(
    thing(
        "endpoints selector",
        jobLabel=STRING,
        targetLabels=STRINGS,
        podTargetLabels=STRINGS,
        selector=core("io.k8s.apimachinery.pkg.apis.meta.v1.LabelSelector"),
        namespaceSelector=thing(any={"type": "boolean"}, matchNames=STRINGS),
        endpoints={
            "type": "array",
            "minItems": 1,
            "items": thing(
                "port",
                port=TEXT,
                path={"type": "string", "pattern": "^/"},
                scheme={"enum": ["http", "https"]},
                interval=DURATION,
                scrapeTimeout=DURATION,
                honorLabels={"type": "boolean"},
                authorization=thing(
                    "credentials",
                    type={"enum": ["Bearer"]},
                    credentials=core("io.k8s.api.core.v1.SecretKeySelector"),
                ),
                relabelings={
                    "type": "array",
                    "items": thing(
                        "sourceLabels", sourceLabels=STRINGS, regex=STRING, action={"enum": ["keep", "drop"]}
                    ),
                },
            ),
        },
    )
)

LEADER_WORKER_SET = kind(
    thing(
        "leaderWorkerTemplate",
        replicas=COUNT,
        startupPolicy={"enum": ["LeaderCreated", "LeaderReady"]},
        rolloutStrategy=thing(
            "type",
            type={"enum": ["RollingUpdate"]},
            rollingUpdateConfiguration=thing(
                partition=COUNT, maxUnavailable=INT_OR_STRING, maxSurge=INT_OR_STRING
            ),
        ),
        networkConfig=thing("subdomainPolicy", subdomainPolicy={"enum": ["Shared", "UniquePerReplica"]}),
        leaderWorkerTemplate=thing(
            "workerTemplate",
            leaderTemplate=core("io.k8s.api.core.v1.PodTemplateSpec"),
            workerTemplate=core("io.k8s.api.core.v1.PodTemplateSpec"),
            size={"type": "integer", "minimum": 1},
            restartPolicy={
                "enum": ["Default", "RecreateGroupOnPodRestart", "RecreateGroupAfterStart", "None"]
            },
        ),
    )
)

SCHEMAS: dict[tuple[str, str], Schema] = {
    ("keda.sh/v1alpha1", "ScaledObject"): SCALED_OBJECT,
    ("keda.sh/v1alpha1", "TriggerAuthentication"): TRIGGER_AUTHENTICATION,
    ("monitoring.coreos.com/v1", "ServiceMonitor"): SERVICE_MONITOR,
    ("leaderworkerset.x-k8s.io/v1", "LeaderWorkerSet"): LEADER_WORKER_SET,
}
