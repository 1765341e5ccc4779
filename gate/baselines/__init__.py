"""What a gate is compared with: routing, merged parameters, FusionRoute, a gate without one of its inputs."""
