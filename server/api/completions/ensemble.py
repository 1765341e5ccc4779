"""How one request is fused: by its model name's policy, by another that the deployment offers, or by coefficients that
it brings itself.
"""

from __future__ import annotations

from server.api.protocol import FusionOptions
from server.config import policy_problem
from server.errors import BadRequest
from server.policy import Policy, Weights
from server.text.deployment import Deployment, Ensemble


def chosen_ensemble(deployment: Deployment, model: str | None, options: FusionOptions | None) -> Ensemble:
    """The experts that a request uses, and its policy. Raises NotFound, BadRequest."""
    named = deployment.policy(deployment.config.name if model is None else model)
    return deployment.ensemble(model, named if options is None else _chosen_policy(deployment, named, options))


def chosen_temperatures(deployment: Deployment, options: FusionOptions | None) -> list[float] | None:
    """One for each expert of the deployment, or None for 1 everywhere. Raises BadRequest."""
    if options is None or options.temperature is None:
        return None
    names = deployment.config.expert_names
    if unknown := [name for name in options.temperature if name not in names]:
        message = f"fusion.temperature: there is no expert named {unknown[0][:64]!r}"
        raise BadRequest(message, param="fusion.temperature")
    return [options.temperature.get(name, 1.0) for name in names]


def _chosen_policy(deployment: Deployment, named: Policy, options: FusionOptions) -> Policy:
    config = deployment.config
    if options.policy is not None:
        if options.policy not in config.policies:
            offered = ", ".join(config.policies)
            raise BadRequest(f"fusion.policy must be one of {offered}", param="fusion.policy")
        return config.policies[options.policy]
    if options.coefficients is None:
        return named
    policy = Weights(options.coefficients, space=options.space or "logprob")
    if problem := policy_problem(policy, config.expert_names, has_gate=config.gate is not None):
        raise BadRequest(f"fusion.coefficients: {problem[:500]}", param="fusion.coefficients")
    return policy
