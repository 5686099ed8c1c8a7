{{- /* The name of the documents: that of the release. */ -}}
{{- define "chatterbox.name" -}}
{{- .Values.fullnameOverride | default .Release.Name -}}
{{- end -}}

{{- /* Labels that select the pods of a component. Arguments: the root, and the name of the component. */ -}}
{{- define "chatterbox.selector" -}}
app.kubernetes.io/name: chatterbox
app.kubernetes.io/instance: {{ include "chatterbox.name" (index . 0) }}
app.kubernetes.io/component: {{ index . 1 }}
{{- end -}}

{{- define "chatterbox.labels" -}}
{{ include "chatterbox.selector" . }}
app.kubernetes.io/part-of: chatterbox-prewarm
{{- end -}}

{{- /* Labels of a document. Those of Helm are in no selector and in no pod, so a new chart replaces no pod. */ -}}
{{- define "chatterbox.documentLabels" -}}
{{ include "chatterbox.labels" . }}
app.kubernetes.io/managed-by: {{ (index . 0).Release.Service }}
helm.sh/chart: {{ printf "%s-%s" (index . 0).Chart.Name (index . 0).Chart.Version | replace "+" "_" }}
{{- end -}}

{{- define "chatterbox.image" -}}
{{- with .Values.image -}}
{{- .repository -}}{{- with .tag }}:{{ . }}{{ end -}}{{- with .digest }}@{{ . }}{{ end -}}
{{- end -}}
{{- end -}}

{{- /* Options of `serve`. Those that belong to a value of this chart come from it; `config` has priority. */ -}}
{{- define "chatterbox.config" -}}
{{- $settings := dict "CHATTERBOX_PREWARM_DRAIN_SECONDS" (toString .Values.seconds.drain) -}}
{{- if .Values.gpu.count -}}
{{- $_ := set $settings "CHATTERBOX_PREWARM_DEVICE" (gt (int .Values.gpu.count) 1 | ternary "cuda:all" "cuda") -}}
{{- end -}}
{{- if .Values.token.secret -}}
{{- $_ := set $settings "CHATTERBOX_PREWARM_TOKEN_FILE" "/etc/chatterbox-prewarm-token/token" -}}
{{- end -}}
{{- if .Values.signatureKey.configMap -}}
{{- $_ := set $settings "CHATTERBOX_PREWARM_KEY" "/etc/chatterbox-prewarm/public.pem" -}}
{{- end -}}
{{- merge (dict) .Values.config $settings | toYaml -}}
{{- end -}}

{{- /* Fields of a pod that select its nodes; the same for the pods that pull the image. */ -}}
{{- define "chatterbox.nodes" -}}
{{- with .Values.nodeSelector }}
nodeSelector: {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .Values.affinity }}
affinity: {{- toYaml . | nindent 2 }}
{{- end }}
{{- $tolerations := .Values.tolerations }}
{{- if and .Values.gpu.count .Values.gpu.toleration }}
{{- $tolerations = prepend $tolerations (dict "key" "nvidia.com/gpu" "operator" "Exists" "effect" "NoSchedule") }}
{{- end }}
{{- with $tolerations }}
tolerations: {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- /* Fields of every pod: no access to the API of the cluster, and the restricted profile. */ -}}
{{- define "chatterbox.pod" -}}
serviceAccountName: {{ include "chatterbox.name" . }}
{{- with .Values.imagePullSecrets }}
imagePullSecrets: {{- toYaml . | nindent 2 }}
{{- end }}
automountServiceAccountToken: false
enableServiceLinks: false
{{- end -}}

{{- define "chatterbox.podSecurity" -}}
runAsNonRoot: true
runAsUser: 12345
runAsGroup: 12345
seccompProfile:
  type: RuntimeDefault
{{- end -}}

{{- define "chatterbox.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop: [ALL]
{{- end -}}
