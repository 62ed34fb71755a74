"""What of KubeRay's v1 resources (ray.io/v1, operator 1.5.1 and later) and of Kubernetes' pods the manifests may use.

Written from the API reference, not copied: a subset, in which every unknown key is an error, as it is to `kubectl`.
"""

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

Quantity = Annotated[str, Field(pattern=r"^\d+(\.\d+)?(m|Ki|Mi|Gi|Ti)?$")]
Name = Annotated[str, Field(pattern=r"^[a-z0-9]([-a-z0-9]*[a-z0-9])?$", max_length=47)]  # KubeRay adds suffixes
Count = Annotated[int, Field(ge=0, lt=1 << 31)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)


class Metadata(_Strict):
    name: Name
    namespace: Name | None = None
    labels: dict[str, str] = {}


class EnvVar(_Strict):
    name: str
    value: str


class Port(_Strict):
    name: Annotated[Name, Field(max_length=15)]
    containerPort: Annotated[int, Field(gt=0, lt=1 << 16)]


class Requirements(_Strict):
    requests: dict[str, Quantity]
    limits: dict[str, Quantity]


class VolumeMount(_Strict):
    name: Name
    mountPath: str


class Capabilities(_Strict):
    drop: list[Literal["ALL"]]


class ContainerSecurity(_Strict):
    allowPrivilegeEscalation: Literal[False]
    capabilities: Capabilities


class PodSecurity(_Strict):
    runAsNonRoot: Literal[True]
    runAsUser: Annotated[int, Field(gt=0)]
    runAsGroup: Annotated[int, Field(gt=0)]
    fsGroup: Annotated[int, Field(gt=0)]


class Container(_Strict):
    name: Name
    image: str
    securityContext: ContainerSecurity
    env: list[EnvVar] = []
    ports: list[Port] = []
    resources: Requirements
    volumeMounts: list[VolumeMount]


class Claim(_Strict):
    claimName: Name


class EmptyDir(_Strict):
    medium: Literal["", "Memory"]
    sizeLimit: Quantity


class Volume(_Strict):
    name: Name
    persistentVolumeClaim: Claim | None = None
    emptyDir: EmptyDir | None = None


class Toleration(_Strict):
    key: str
    operator: Literal["Exists", "Equal"]
    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"]


class PodSpec(_Strict):
    restartPolicy: Literal["Never"]  # the autoscaler's second version asks for it
    securityContext: PodSecurity
    containers: Annotated[list[Container], Field(min_length=1)]
    volumes: list[Volume]
    terminationGracePeriodSeconds: Count = 30
    nodeSelector: dict[str, str] = {}
    tolerations: list[Toleration] = []


class PodTemplate(_Strict):
    spec: PodSpec


class HeadGroup(_Strict):
    rayStartParams: dict[str, str]
    template: PodTemplate


class WorkerGroup(_Strict):
    groupName: Name
    replicas: Count
    minReplicas: Count
    maxReplicas: Count
    rayStartParams: dict[str, str]
    template: PodTemplate


class AutoscalerOptions(_Strict):
    version: Literal["v1", "v2"]
    idleTimeoutSeconds: Count
    upscalingMode: Literal["Default", "Aggressive", "Conservative"] = "Default"


class AuthOptions(_Strict):
    mode: Literal["disabled", "token"]


class RayClusterSpec(_Strict):
    rayVersion: str
    authOptions: AuthOptions
    enableInTreeAutoscaling: bool
    autoscalerOptions: AutoscalerOptions
    headGroupSpec: HeadGroup
    workerGroupSpecs: list[WorkerGroup]


class RayJobSpec(_Strict):
    entrypoint: str
    runtimeEnvYAML: str = ""
    shutdownAfterJobFinishes: bool
    ttlSecondsAfterFinished: Count
    backoffLimit: Count
    submissionMode: Literal["K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"] = "K8sJobMode"
    rayClusterSpec: RayClusterSpec


class RayJob(_Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayJob"]
    metadata: Metadata
    spec: RayJobSpec


class RayServiceSpec(_Strict):
    serveConfigV2: str
    rayClusterConfig: RayClusterSpec


class RayService(_Strict):
    apiVersion: Literal["ray.io/v1"]
    kind: Literal["RayService"]
    metadata: Metadata
    spec: RayServiceSpec


class _Storage(_Strict):
    requests: dict[Literal["storage"], Quantity]


class _ClaimSpec(_Strict):
    accessModes: list[Literal["ReadWriteOnce", "ReadOnlyMany", "ReadWriteMany", "ReadWriteOncePod"]]
    storageClassName: str
    resources: _Storage


class PersistentVolumeClaim(_Strict):
    apiVersion: Literal["v1"]
    kind: Literal["PersistentVolumeClaim"]
    metadata: Metadata
    spec: _ClaimSpec


class _Expression(_Strict):
    key: str
    operator: Literal["In", "NotIn"]
    values: list[str]


class Selector(_Strict):
    matchLabels: dict[str, str] = {}
    matchExpressions: list[_Expression] = []


class Peer(_Strict):
    podSelector: Selector | None = None
    namespaceSelector: Selector | None = None


class PolicyPort(_Strict):
    protocol: Literal["TCP", "UDP"]
    port: Annotated[int, Field(gt=0, lt=1 << 16)]


class Ingress(_Strict):
    from_: Annotated[list[Peer], Field(alias="from", min_length=1)]
    ports: list[PolicyPort] = []


class _PolicySpec(_Strict):
    podSelector: Selector
    policyTypes: list[Literal["Ingress", "Egress"]]
    ingress: list[Ingress]


class NetworkPolicy(_Strict):
    apiVersion: Literal["networking.k8s.io/v1"]
    kind: Literal["NetworkPolicy"]
    metadata: Metadata
    spec: _PolicySpec
