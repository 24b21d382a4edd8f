"""What keeps a run alive and an evaluation honest, a room a file, from the ground up:

waiting          how torch's threads wait, decided before torch is imported
freed_memory     memory that a CPU's step frees is kept for the next
terminal         printing that outlives its terminal
command          flags, errors, signals, workers, whole files, rows: what stands around every main
run_lock         one owner for a run's folder
distributed      launch lines and their guards, networks laid out, common decisions of processes
fast_backbone    shortcuts for backbones in training
bf16_on_cpu      whether bf16 is faster on a CPU, and what makes its gradients right
convolutions     weight gradients by matrix products, on CPUs where oneDNN is slow at them
feature_maps     attention and feature maps of a backbone, their components as colours
masks            masks of objects: files, regions and boundaries compared
pictures         sheets, curves, heat maps and points, drawn by Pillow
linear_probe     logistic regression on features that are computed already
ranking          average precision of what a search brings, in its order
foreign          weights as other projects write them: unwrapped, renamed
weights          weights from elsewhere: read, matched, loaded
estimate         what a step will take on this machine, before the first
decoded_once     images that are kept in memory once they are decoded
defaults         settings that follow from images, length of the run and network
flags            recipes, checks of settings, what follows from data and machine
saved_run        what is saved of a run: tensors and metadata
run              a run's folder: when it is saved, and how it goes on
trackers         TensorBoard and W&B, which go on where the run goes on
monitor          progress, log, curves, unreadable images, collapse
outlook          header, warnings, dry run
feature_quality  what features are worth, without labels: RankMe
few_labels       a few labelled images of each class, drawn by chance
opened_network   a network from a file or by name, and how its images are prepared
evaluation       a frozen backbone: its images, its features, what is reported
online_knn       the teacher's k-NN and RankMe during training

A file imports only those listed above it, and the top level's models.py, losses.py, multicrop.py,
data.py, folders.py, pixels.py, tar_shards.py, optimizers.py and config.py. None imports a script.
"""
